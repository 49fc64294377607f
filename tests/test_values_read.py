"""Values that a step reads and fake tensors do not have: where nothing but a log depends on them the step is planned."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ullage as ul


def _step(reads: Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Any]) -> ul.Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    log: dict[str, Any] = {"best": 1e9, "total": 0.0, "all": []}

    def step(m: nn.Module, x: Tensor) -> None:
        out = m(x)
        loss = out.square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        go = reads(loss, norm, out, log)
        if go is not False:
            optimizer.step()
        optimizer.zero_grad()

    return ul.Workload(model, torch.randn(8, 16), step=step)


def _best(loss: Tensor, norm: Tensor, out: Tensor, log: dict[str, Any]) -> None:
    if loss.item() < log["best"]:
        log["best"] = loss.item()


def _raises(loss: Tensor, norm: Tensor, out: Tensor, log: dict[str, Any]) -> None:
    if not torch.isfinite(loss) or (out.abs() > 1.5).all():
        raise FloatingPointError("loss")
    if not (norm >= 0).all().item():
        raise AssertionError("norm")


LOGS: dict[str, Callable[..., Any]] = {
    "item": lambda loss, norm, out, log: log.update(total=log["total"] + loss.item()),
    "float": lambda loss, norm, out, log: log["all"].append(float(norm)),
    "f-string": lambda loss, norm, out, log: log["all"].append(f"{loss:.3f} {norm} {loss!r:>9}"),
    "percent": lambda loss, norm, out, log: "%.3f" % norm,  # noqa: UP031
    "int": lambda loss, norm, out, log: log["all"].append((out.argmax(-1) == 1).sum().item()),
    "bool": lambda loss, norm, out, log: log.update(any=bool((out > 0.3).any())),
    "tolist": lambda loss, norm, out, log: log["all"].extend(out.detach()[0].tolist()),
    "numpy": lambda loss, norm, out, log: log["all"].append(out.detach().cpu().numpy().mean()),
    "numpy of int": lambda loss, norm, out, log: np.bincount(out.argmax(-1).numpy(), minlength=4),
    "best": _best,
    "checks that raise": _raises,
    "a number": lambda loss, norm, out, log: out.detach().mul(norm.item()),
}


@pytest.mark.parametrize("kind", LOGS)
def test_logs(kind: str) -> None:
    plain = ul.profile(_step(lambda *_: None), costs="roofline")
    found = ul.profile(_step(LOGS[kind]), costs="roofline")
    assert found.peak_bytes - plain.peak_bytes in (0, 4, 8, 128, 160)
    assert any(w in n for n in found.notes for w in ("test_values_read.py:", "finite", "balanced routing"))


def _unique(loss: Tensor, norm: Tensor, out: Tensor, log: dict[str, Any]) -> Any:
    return torch.zeros(len(np.unique((out * 3).detach().numpy().round())), 4) + out[:1].detach()


STEERS: dict[str, Callable[..., Any]] = {
    "if": lambda loss, norm, out, log: bool(loss.item() > 3.0),
    "which is larger": lambda loss, norm, out, log: loss.item() > norm.item() or not bool(norm > loss),
    "a size": lambda loss, norm, out, log: torch.zeros(int((out > 0).sum()), 4).add_(1),
    "a loop": lambda loss, norm, out, log: [out.detach() * 2 for _ in range(out.argmax().item())],
    "a list of other length": _unique,
    "a bool": lambda loss, norm, out, log: bool((out > 0.5).any()),
}


@pytest.mark.parametrize("kind", STEERS)
def test_values_that_steer_are_those_of_real_steps(kind: str) -> None:
    work = _step(STEERS[kind])
    found = ul.profile(work)
    assert found.peak_bytes == ul.measure(work, steps=1).peak_bytes
    assert any(r.how == "run" and "test_values_read.py:" in r.line for r in found.reads)


@pytest.mark.parametrize("kind", ["if", "a size"])
def test_values_that_steer_are_assumed_on_request_and_it_is_said(kind: str) -> None:
    found = ul.profile(_step(STEERS[kind]), costs="roofline", values="assumed")
    assert any("steer the step; they were taken to be 1" in n and "test_values_read.py:" in n for n in found.notes)


class Head(nn.Module):
    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.table, self.f = nn.Linear(16, 16), nn.Parameter(torch.randn(8, 16)), f

    def forward(self, *batch: Tensor) -> Tensor:
        return self.f(self, self.l(batch[0]), *batch[1:]).square().mean()


def _near(s: Head, h: Tensor) -> Tensor:
    return torch.cdist(h.flatten(0, -2), s.table).argmin(-1)


MASK = torch.arange(24).view(4, 6) % 3 == 0
RIGHT: dict[str, Callable[..., Tensor]] = {
    "argument checks": lambda s, h, m: D.Normal(h, h.exp()).log_prob(torch.zeros(16)),
    "gaussian_nll_loss": lambda s, h, m: F.gaussian_nll_loss(h, torch.zeros_like(h), h.exp()),
    "a guard": lambda s, h, m: h.clamp(-65504, 65504) if (h.abs() > 65504).any() else h,
    "codebook[argmin]": lambda s, h, m: s.table[_near(s, h)],
    "h[rows, columns]": lambda s, h, m: h[torch.arange(4)[:, None], (h[..., 0].abs().long() % 6)],
    "h.masked_select": lambda s, h, m: h.masked_select(m[..., None]).view(-1, 16).sum(0),
    "large float mask": lambda s, h, m: h * 2 if (torch.zeros(64, 256) < 0).any() else h,
}


@pytest.mark.parametrize("kind", RIGHT)
def test_bytes(kind: str) -> None:
    work = ul.Workload(Head(RIGHT[kind]), (torch.randn(4, 6, 16), MASK))
    costs = "auto" if kind in ("h.masked_select", "large float mask") else "roofline"
    assert ul.profile(work, costs=costs).peak_bytes == ul.measure(work, steps=1).peak_bytes


def test_masks_of_any_dimensions() -> None:
    for pick in (lambda s, h, m: h[m], lambda s, h, m: h[:, m[0]], lambda s, h, m: h[:, :, torch.arange(16) < 3]):
        work = ul.Workload(Head(pick), (torch.randn(4, 6, 16), MASK))
        assert ul.profile(work, costs="roofline").peak_bytes == ul.measure(work, steps=1).peak_bytes


def test_masks_that_depend_on_activations_have_the_size_of_a_real_step() -> None:
    work = ul.Workload(Head(lambda s, h: h[h > 0]), torch.randn(4, 16))
    found = ul.profile(work)
    assert found.peak_bytes == ul.measure(work, steps=1).peak_bytes
    chosen = int((work.model.l(work.batch) > 0).sum())
    assert [(r.module, r.what, r.taken, r.how) for r in found.reads] == [("", "index", f"{chosen} of 4x16", "run")]


class Packed(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.l = nn.Embedding(50, 8), kind(8, 16, batch_first=True, **settings)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.e(ids), lengths, batch_first=True, enforce_sorted=False)
        out: Tensor = pad_packed_sequence(self.l(packed)[0], batch_first=True)[0]
        return out.square().mean()


LAYERS: list[Any] = [
    (nn.LSTM, {"bidirectional": True}),
    (nn.GRU, {}),
    (nn.LSTM, {"proj_size": 5, "bias": False}),
    pytest.param(nn.LSTM, {"num_layers": 2, "dropout": 0.3, "bias": False}, marks=pytest.mark.slow),
    pytest.param(nn.RNN, {"nonlinearity": "relu", "bidirectional": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "settings"), LAYERS)
def test_packed_sequences(kind: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    work = ul.Workload(Packed(kind, **settings), (torch.randint(0, 50, (3, 4)), torch.tensor([4, 2, 4])))
    assert ul.profile(work, costs="roofline").peak_bytes == ul.measure(work, steps=1).peak_bytes


class Dense(nn.Module):
    """What oneDNN has no op for is unrolled over time."""

    def __init__(self, dtype: torch.dtype, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.LSTM(6, 8, dtype=dtype, **settings)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.l(x)[0]
        return out.square().mean()


@pytest.mark.parametrize(
    ("dtype", "settings"), [(torch.float32, {"proj_size": 3, "bias": False}), (torch.float64, {"num_layers": 2})]
)
def test_dense_layers_without_a_kernel_of_onednn(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    work = ul.Workload(Dense(dtype, **settings), torch.randn(4, 3, 6, dtype=dtype))
    assert ul.profile(work, costs="roofline").peak_bytes == ul.measure(work, steps=1).peak_bytes


def test_an_optimizer_that_reads_a_number() -> None:
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("torch has no Adafactor")
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    work = ul.Workload(
        model, torch.randn(8, 16), loss=lambda o, b: o.square().mean(), optimizer=lambda p: torch.optim.Adafactor(p)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ul.profile(work, costs="roofline").peak_bytes >= ul.measure(work, steps=1).peak_bytes
