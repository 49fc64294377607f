"""Values and sizes that depend on activations: those of real steps (`values="run"`), or assumed ones (`assume=`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from ullage_cli._main import run

HERE = "test_values_run.py"


class Head(nn.Module):
    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.f = nn.Linear(16, 32), nn.Linear(32, 32), f

    def forward(self, *batch: Tensor) -> Tensor:
        return self.f(self, self.a(batch[0]), *batch[1:])


def _hard_examples(s: Head, h: Tensor) -> Tensor:
    losses = h.square().mean(-1)
    return s.b(h.masked_select((losses > losses.mean())[:, None]).view(-1, 32)).square().mean()


def _levels(s: Head, h: Tensor) -> Tensor:
    found, at = torch.unique((h.detach()[:, 0] * 4).round(), return_inverse=True)
    return (s.b(h) * found[at][:, None]).square().mean() + found.numel() * h.mean()


def _dropping(s: Head, h: Tensor) -> Tensor:
    share, expert = h[:, :4].softmax(-1).max(-1)
    out = torch.zeros_like(h)
    for k in range(4):
        rows = torch.where((expert == k) & (share > 0.27))[0][:8]
        if rows.numel():
            out = out.index_add(0, rows, s.b(h[rows]) * share[rows, None])
    return out.square().mean()


def _early_exit(s: Head, h: Tensor) -> Tensor:
    for _ in range(6):
        h = torch.tanh(s.b(h))
        if h.std().item() < 0.4:
            break
    return h.square().mean()


def _halves(s: Head, h: Tensor) -> Tensor:
    upper = h.sum(-1) > 0
    out = torch.zeros_like(h)
    out[upper] = s.b(h[upper]) * 2
    return nn.utils.rnn.pad_sequence([out[upper], h[~upper]], batch_first=True).square().mean()


def _lists(s: Head, h: Tensor) -> Tensor:
    sizes = h.detach()[:, :3].argmax(-1).bincount().tolist()
    return sum((s.b(part).square().sum() for part in h.split(sizes)), h.new_zeros(()))


SIZES = {
    "hard examples": _hard_examples,
    "levels": _levels,
    "dropping": _dropping,
    "early exit": _early_exit,
    "halves": _halves,
    "lists": _lists,
}


@pytest.mark.parametrize("kind", SIZES)
def test_bytes_are_those_of_the_real_step(kind: str) -> None:
    work = ul.Workload(Head(SIZES[kind]), torch.randn(64, 16), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    found = ul.profile(work)
    assert found.peak_bytes == ul.measure(work, steps=1).peak_bytes
    assert {r.how for r in found.reads} == {"run"}
    assert all(HERE in r.line for r in found.reads)


class Routed(nn.Module):
    """A block in which some rows skip, as mixture-of-depths has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, 1)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        rows = (self.gate(h).squeeze(-1) > 0).nonzero().squeeze(-1)
        y = self.down(torch.relu(self.up(h[rows])))
        return x.index_add(0, rows, y * 1.5 if y.abs().mean() > 0.01 else y)


class Twice(nn.Module):
    """Every block runs twice, so that one unit has several calls, each with sizes of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Routed(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(block(x) * 1.1)
        return x.square().mean()


def test_a_replay_reads_what_its_forward_has_read() -> None:
    work = ul.Workload(Twice(), torch.randn(64, 16), optimizer=lambda p: torch.optim.AdamW(p, lr=0.0), accumulate=2)
    plan = ul.plan(work, policy="every_block")
    assert plan.counts() == {"recompute": 2}
    assert plan.predicted.peak_bytes == ul.measure(work, plan, steps=1).peak_bytes < ul.profile(work).peak_bytes
    assert ul.verify(work, plan).ok


def test_everything_is_put_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 16)).sum().backward()
    optimizer.step()
    runs: list[bool] = []
    seen: dict[str, Any] = {"best": 1e9, "losses": [], "ema": torch.ones(4)}

    def step(m: nn.Module, x: Tensor) -> None:
        out = m(x + torch.randn(x.shape) * random.random() * np.random.rand())
        loss = out.square().mean()
        runs.append(loss.item() < 1e6)
        seen["ema"].mul_(0.9).add_(out.detach().mean(0), alpha=0.1)
        if loss.item() < seen["best"]:
            seen["best"] = loss.item()
            seen["losses"].append(loss.item())
            m.best = out.detach().clone()  # type: ignore[assignment]
        loss.backward()
        optimizer.step()

    def state() -> list[Any]:
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), seen["ema"]]
        tensors += [v for s in optimizer.state.values() for v in s.values()]
        generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        plain = dict(seen, ema=None), list(runs), hasattr(model, "best")
        return [[t.clone() for t in tensors if t is not None], generators[0], generators[1:], repr(plain)]

    before = state()
    found = ul.profile(
        ul.Workload(model, torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), step=step),
        values="run",
        costs="roofline",
    )
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert [r.how for r in found.reads] == ["run"] * len(found.reads) != []


def test_guards_are_taken_to_hold_and_nothing_is_run() -> None:
    def guarded(s: Head, h: Tensor) -> Tensor:
        bad = torch.isnan(h).any() or torch.isinf(h).any()
        return (torch.nan_to_num(h) if bad else h).square().mean()

    found = ul.profile(ul.Workload(Head(guarded), torch.randn(64, 16)), costs="roofline")
    assert found.reads == [] and any("finite" in n for n in found.notes)


def test_two_conditions_that_only_differ_together_are_seen() -> None:
    def either(s: Head, h: Tensor) -> Tensor:
        same = torch.equal(h, h.detach())
        near = (h * 1.5 - h).abs().max() < 1e-6
        return (h if same and not near else torch.tanh(h)).square().mean()

    work = ul.Workload(Head(either), torch.randn(64, 16))
    found = ul.profile(work)
    assert {r.how for r in found.reads} == {"run"}
    assert found.peak_bytes == ul.measure(work, steps=1).peak_bytes


def test_a_step_that_only_logs_is_not_run() -> None:
    ran: list[str] = []

    def step(m: nn.Module, x: Tensor) -> None:
        out = m(x)
        ran.append(type(out).__name__)
        out.square().mean().backward()
        ran.append(f"{out.mean():.3f}")

    ul.profile(ul.Workload(nn.Linear(4, 4), torch.randn(2, 4), step=lambda m, x: step(m, x)), costs="roofline")
    assert "Tensor" not in ran


@pytest.mark.parametrize("history_size", [2, 4, 8])
def test_a_history_that_grows_is_counted_as_full(history_size: int) -> None:
    """Per iteration that it holds: two differences of 68 floats, and two numbers."""
    model = nn.Linear(16, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, history_size=history_size)

    def step(m: nn.Module, x: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = m(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    work = ul.Workload(model, torch.randn(8, 16), step=step)
    found, measured = ul.profile(work), ul.measure(work, steps=1)
    for _ in range(2):
        step(model, work.batch)
    state = optimizer.state[model.weight]
    more = history_size - len(state["old_dirs"])
    missing = more * (2 * 68 + 1) * 4 + (2 * 68 * 4 if more else 0)
    missing += sum(a is None for a in state["al"]) * 4
    assert found.later_step_peak_bytes == measured.step_peaks[1] + missing
    assert found.peak_bytes >= max(measured.step_peaks)
    said = [n for n in found.notes if "history of LBFGS is counted as full" in n]
    assert len(said) == (1 if missing else 0) and not any("more bytes behind" in n for n in found.notes)


def test_what_grows_with_every_step_is_said() -> None:
    model, kept = nn.Linear(16, 4), list[Tensor]()

    def step(m: nn.Module, x: Tensor) -> None:
        loss = m(x).square().mean()
        if loss > 0:
            loss = loss * 2
        loss.backward()
        kept.append(x.detach() * 2)

    found = ul.profile(ul.Workload(model, torch.randn(8, 16), step=step), values="run")
    assert any("leaves 512 more bytes behind than the first" in n for n in found.notes)


def test_an_average_and_its_counter_are_no_activations() -> None:
    model = nn.Linear(16, 4)
    average = torch.optim.swa_utils.AveragedModel(model)

    def step(m: nn.Module, x: Tensor) -> None:
        m(x).square().mean().backward()
        average.update_parameters(m)  # `if self.n_averaged == 0`

    work = ul.Workload(model, torch.randn(8, 16), step=step)
    found = ul.profile(work)
    assert found.reads == [] and found.peak_bytes == ul.measure(work, steps=1).peak_bytes


def test_ctc() -> None:
    def lossy(s: Head, h: Tensor, *rest: Tensor) -> Tensor:
        return F.ctc_loss(s.b(h).log_softmax(-1).transpose(0, 1), *rest)

    lengths = torch.full((4,), 20), torch.tensor([6, 5, 4, 6])
    work = ul.Workload(Head(lossy), (torch.randn(4, 20, 16), torch.randint(1, 32, (4, 6)), *lengths))
    found = ul.profile(work)
    assert found.reads == [] and found.peak_bytes == ul.measure(work, steps=1).peak_bytes


def _of(mask: Callable[[Tensor], Tensor]) -> ul.Workload:
    return ul.Workload(Head(lambda s, h, *_: s.b(h[mask(h)]).square().mean()), torch.randn(64, 16))


def test_the_share_of_a_mask_may_be_assumed() -> None:
    quarter = _of(lambda h: torch.arange(64) % 4 == 0)
    unknown = _of(lambda h: h.sum(-1) > 0)
    for assume in ({"mask": 0.25}, {f"{HERE}:{_of.__code__.co_firstlineno + 1}": 16}):
        found = ul.profile(unknown, assume=assume, costs="roofline")
        assert found.peak_bytes == ul.profile(quarter, costs="roofline").peak_bytes
        assert [(r.what, r.taken, r.how) for r in found.reads] == [("index", "16 of 64", "given")]
    bound = ul.profile(unknown, values="assumed", costs="roofline")
    assert any("takes 64 of 64" in n or "64 of 64 elements, which is a bound" in n for n in bound.notes)
    assert bound.peak_bytes > found.peak_bytes


def test_masks_are_assumed_to_be_as_those_of_the_batch() -> None:
    attended = torch.arange(64) % 8 != 0
    work = ul.Workload(
        Head(lambda s, h, m: s.b(h[(h.sum(-1) > 0) & m]).square().mean()), (torch.randn(64, 16), attended)
    )
    assert [r.taken for r in ul.profile(work, costs="roofline", values="assumed").reads] == ["56 of 64"]


def test_a_number_may_be_assumed_by_its_line() -> None:
    def rounds(s: Head, h: Tensor) -> Tensor:
        for _ in range(int(h.abs().max())):
            h = s.b(h)
        return h.square().mean()

    work = ul.Workload(Head(rounds), torch.randn(64, 16))
    line = f"{HERE}:{rounds.__code__.co_firstlineno + 1}"
    few, many = (ul.profile(work, assume={line: n}, costs="roofline") for n in (1, 5))
    assert many.peak_bytes - few.peak_bytes == 4 * 64 * 32 * 4
    assert [(r.line.rpartition("/")[2], r.taken, r.how) for r in many.reads] == [(line, "5.0", "given")]


def test_a_size_that_no_share_tells_is_asked_for_by_its_line() -> None:
    def repeated(s: Head, h: Tensor) -> Tensor:
        return s.b(torch.repeat_interleave(h[:, :1].detach().abs().long()[:, 0])[:, None] * h[:1]).square().mean()

    work = ul.Workload(Head(repeated), torch.randn(64, 16))
    line = f"{HERE}:{repeated.__code__.co_firstlineno + 1}"
    with pytest.raises(
        ul.CaptureError, match=rf"{HERE}:\d+: .*repeat_interleave.*values='run'.*assume={{'{line}': number}}"
    ):
        ul.profile(work, costs="roofline", values="assumed")
    few, many = (ul.profile(work, costs="roofline", assume={line: n}).peak_bytes for n in (100, 200))
    assert many - few >= 100 * 32 * 4


def test_a_device_that_is_not_here_gets_assumptions() -> None:
    found = ul.profile(
        _of(lambda h: h.sum(-1) > 0),
        "h100-80gb" if "h100-80gb" in ul.devices() else next(d for d in ul.devices() if d != "cpu"),
    )
    assert [(r.taken, r.how) for r in found.reads] == [("64 of 64", "assumed")]


def test_a_plan_keeps_its_assumptions() -> None:
    work = _of(lambda h: h.sum(-1) > 0)
    plan = ul.plan(work, policy="none", assume={"mask": 0.25}, costs="roofline")
    assert (plan.values, plan.assume) == ("auto", {"mask": 0.25})
    assert ul.bounds(work, plan).peak_bytes == plan.predicted.peak_bytes


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"values": "real"}, "values='real': expected 'auto', 'assumed', 'run'"),
    ({"assume": {"masks": 0.1}}, "assume: 'masks' is none of"),
    ({"assume": {"mask": 15}}, "mask=15: expected a share between 0 and 1"),
    ({"assume": {"mask": 0.1}, "values": "run"}, "values='run' takes the values of a real step"),
    ({"assume": {"nowhere.py:3": 1}}, rf"read at nowhere.py:3; lines that do: \S*{HERE}:\d+"),
]


@pytest.mark.parametrize(("given", "says"), WRONG)
def test_wrong_assumptions_are_refused(given: dict[str, Any], says: str) -> None:
    work = ul.Workload(Head(lambda s, h: h.mean() * h.mean().item()), torch.randn(8, 16))
    with pytest.raises(ul.ArgumentError, match=says):
        ul.profile(work, costs="roofline", **given)


def test_the_command_takes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.py").write_text(
        "import torch, ullage as ul\nfrom torch import nn\n"
        "class M(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.a = nn.Linear(16, 16)\n"
        "    def forward(self, x):\n        h = self.a(x)\n        return h[h.sum(-1) > 0].sum()\n"
        "def make():\n    return ul.Workload(M(), torch.randn(40, 16))\n"
    )
    target = [f"{tmp_path}/some.py:make", "--costs", "roofline"]
    for given, taken in (
        (["--assume", "mask=0.3"], "index 12 of 40 (given)"),
        (["--values", "run"], "(run)"),
    ):
        assert run(["profile", *target, *given]) == 0
        assert taken in capsys.readouterr().out
    assert run(["profile", *target, "--assume", "mask"]) == 2
