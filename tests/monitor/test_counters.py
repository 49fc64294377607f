"""What is counted: FLOPs of the model and of replays, units, ops and bytes that are done again, mismatches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torchs
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import ullage as ul
from tests.monitor.running import Clock, dispatch_modes, monitor
from tests.small import tiny
from ullage.monitor._flops import OpCounter
from ullage.monitor._utilization import Peak, Utilization
from ullage.runtime.ambient._totals import totals
from ullage.workload import run_step


def run(m: ul.Monitor, step: Any, times: int = 4) -> list[Any]:
    """The records of some steps, warm-up included."""
    found: list[Any] = []
    m._tally.add = found.append  # type: ignore[method-assign]
    for _ in range(times):
        with m.step():
            step()
    m.close()
    return found


def test_recomputed_units_are_those_of_the_report() -> None:
    work = tiny()
    handle = ul.plan(work, policy="every_block", costs="roofline").apply(work.model)
    inst = work.instance()
    found = run(ul.Monitor(handle), lambda: run_step(inst))
    assert [r.recomputed_units for r in found] == [2, 2, 2, 2]
    assert sum(u.recomputed for u in handle.report().units) == 8
    assert [r.skipped_ops for r in found] == [0, 0, 0, 0] and not any(
        r.replay_mismatches or r.stale_logs for r in found
    )
    assert [r.recomputed_ops for r in found[2:]] == [found[1].recomputed_ops] * 2 and found[1].recomputed_ops > 0


def test_skipped_ops_are_those_of_the_report() -> None:
    work = tiny()
    handle = ul.plan(work, policy="selective", costs="roofline").apply(work.model)
    inst = work.instance()
    found = run(ul.Monitor(handle), lambda: run_step(inst), times=5)
    report = handle.report()
    assert sum(r.skipped_ops for r in found) == sum(u.skipped_ops for u in report.units) > 0
    assert sum(r.recomputed_units for r in found) == sum(u.recomputed for u in report.units)
    steady = [(r.recomputed_units, r.skipped_ops, r.recomputed_ops, r.recomputed_bytes) for r in found[1:]]
    assert len(set(steady)) == 1 and None not in steady[0]  # the counted step replays as all that come after


class Two(nn.Module):
    """Two linear maps (8 to 8) with a GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.gelu(self.one(x)))  # type: ignore[no-any-return]


MM = 2 * 4 * 8 * 8  # FLOPs of one of its matmuls, for 4 rows


@pytest.mark.parametrize(
    "wrap, again",
    [
        (lambda m, x: m(x), 0),
        (lambda m, x: ul.checkpoint(m, x), 1),  # early stop: the second matmul is not done again
        (lambda m, x: torchs.checkpoint(m, x, use_reentrant=False), 1),
        (lambda m, x: torchs.checkpoint(m, x, use_reentrant=True), 2),
    ],
    ids=["plain", "ullage", "torch", "reentrant"],
)
def test_flops_of_the_model_are_without_recomputation(wrap: Any, again: int) -> None:
    model, x = Two(), torch.ones(4, 8, requires_grad=True)
    found = run(ul.Monitor(model), lambda: wrap(model, x).sum().backward(), times=3)
    assert [r.flops for r in found] == [None, 6 * MM, None]  # per map: forward, and a gradient for input and weight
    assert found[1].recomputed_flops == again * MM
    with FlopCounterMode(display=False) as whole:
        wrap(model, x).sum().backward()
    assert whole.get_total_flops() == (6 + again) * MM  # torch's own counter counts recomputation as the model's


def test_second_derivatives_are_the_models() -> None:
    one, two, x = (torch.ones(*s, requires_grad=True) for s in ((8, 8), (8, 8), (4, 8)))

    def step() -> None:
        (grad,) = torch.autograd.grad((F.gelu(x @ one) @ two).sum(), x, create_graph=True)
        grad.square().sum().backward()

    found = run(ul.Monitor(nn.Identity()), step, times=2)
    with FlopCounterMode(display=False) as whole:
        step()
    assert found[1].flops == whole.get_total_flops() and found[1].recomputed_flops == 0


def test_recomputed_ops_and_bytes() -> None:
    model, x = Two(), torch.ones(4, 8, requires_grad=True)
    found = run(ul.Monitor(model), lambda: ul.checkpoint(model, x).sum().backward(), times=3)
    # of the replay: t, mm, gelu, t; mm and gelu make 4 x 8 floats each, t makes none
    assert [(r.recomputed_units, r.recomputed_ops, r.recomputed_bytes) for r in found] == [
        (1, None, None), (1, 4, 2 * 4 * 8 * 4), (1, 4, 2 * 4 * 8 * 4),
    ]  # fmt: skip


def test_steps_that_replay_otherwise_are_not_given_the_counted_ones_numbers() -> None:
    model, x, turn = Two(), torch.ones(4, 8, requires_grad=True), itertools.count()

    def step() -> None:
        k = next(turn)
        y = model(x) if k == 2 else ul.checkpoint(model, x)
        (ul.checkpoint(model, y) if k == 3 else y).sum().backward()

    found = run(ul.Monitor(model, peak_flops=1e9), step, times=5)
    assert [r.recomputed_units for r in found] == [1, 1, 0, 2, 1]
    assert [r.recomputed_ops is not None for r in found] == [False, True, True, False, True] and found[
        2
    ].recomputed_ops == 0
    assert [r.hfu is not None for r in found] == [False, False, False, False, True]


def test_attention_on_a_cpu_is_counted() -> None:
    q = torch.ones(2, 3, 16, 8, requires_grad=True)
    with OpCounter() as counter:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    one = 2 * 2 * 3 * 16 * 16 * 8
    assert sum(counter.flops.values()) == (2 + 5) * one and not counter.unknown  # torch counts 5 in its backward


def test_what_has_no_formula_is_said() -> None:
    model = nn.LSTM(4, 4)
    m = ul.Monitor(model, peak_flops=1e9)
    for _ in range(3):
        with m.step():
            model(torch.ones(2, 1, 4))[0].sum().backward()
    s = m.summary()
    assert s.mfu is None and s.flops_per_step is None
    assert s.not_available["MFU"].startswith("no formula gives the FLOPs of ") and s.not_available["MFU"].endswith(
        "; pass flops_per_step="
    )
    given = ul.Monitor(model, peak_flops=1e9, flops_per_step=1e3)
    for _ in range(3):
        with given.step():
            model(torch.ones(2, 1, 4))[0].sum().backward()
    assert given.summary().mfu is not None and "MFU" not in given.summary().not_available


def test_no_flops_at_all() -> None:
    m = ul.Monitor(nn.GELU(), peak_flops=1e9)
    for _ in range(3):
        with m.step():
            torch.ones(3, requires_grad=True).sum().backward()
    assert m.summary().not_available["MFU"] == "no op with FLOPs was seen in the counted step; pass flops_per_step="


class Wrapped(Tensor):
    """A subclass that computes with the plain tensor it holds, as DTensor does."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(t: Any) -> Any:
            return t.inner[:2] if isinstance(t, Wrapped) else t  # a shard

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def test_a_subclass_is_counted_by_what_it_does() -> None:
    with OpCounter() as counter:
        torch.mm(Wrapped(torch.ones(4, 8)), torch.ones(8, 8))
    assert counter.flops == {"float32": 2 * 2 * 8 * 8}


def test_utilization_over_dtypes() -> None:
    peak = Peak("h200", "")
    assert peak.seconds({"bfloat16": 989_000, "float32": 67_000}) == pytest.approx(2e-9, rel=1e-12)
    assert peak.seconds({"float64": 1}) == "the device table has no rate for float64; pass peak_flops="
    assert Peak(None, "NVIDIA H200").rates == Peak("h200", "").rates
    assert Peak(None, "NVIDIA H100 PCIe").why == "the peak FLOP/s of 'NVIDIA H100 PCIe' are not known; pass peak_flops="
    use, counter = Utilization(Peak("h200", ""), None, ""), OpCounter()
    counter.flops["bfloat16"], counter.again["bfloat16"] = 989_000_000, 329_670_330
    use.take(counter, 1, (4, None), (2, 0, 0))
    mfu, hfu = use.of(2e-6, None, 1, (4, None), (2, 0, 0))
    assert mfu == pytest.approx(0.5) and hfu == pytest.approx(0.5 * (1 + 329_670_330 / 989_000_000))
    assert use.of(2e-6, 2 * 989e6, 1, (9, None), (0, 0, 0))[0] == pytest.approx(1.0)  # as given, at the counted dtypes


def test_shapes_that_differ_have_no_utilization() -> None:
    model = nn.Linear(4, 4)
    m = ul.Monitor(model, peak_flops=1e9)
    for samples in (2, 2, 2, 3):
        with m.step(samples=samples):
            model(torch.ones(samples, 4)).sum().backward()
    m.summary()
    assert [r.mfu is None for r in m._tally.ring] == [False, True]
    assert (
        m.summary()
        .not_available["MFU of some steps"]
        .startswith("they differ from the counted step in samples or tokens")
    )


def test_two_monitors_that_overlap_count_one_after_the_other() -> None:
    model = nn.Linear(4, 4)
    a, b = ul.Monitor(model, warmup=1), ul.Monitor(model, warmup=1)
    for _ in range(3):
        a.step_begin()
        b.step_begin()
        model(torch.ones(2, 4)).sum().backward()
        a.step_end()
        model(torch.ones(2, 4)).sum().backward()
        b.step_end()
        assert dispatch_modes() == 0
    once = 2 * (2 * 2 * 4 * 4)
    assert (a.summary().flops_per_step, b.summary().flops_per_step) == (once, 2 * once)


def test_a_compiled_function_in_the_model() -> None:
    """Its ops are counted as if it were not compiled, or not at all and it is said: never in part."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))
            self.inner = torch.compile(lambda x, w: F.gelu(x @ w), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, self.weight) @ self.weight  # type: ignore[no-any-return]

    model = Inner()
    found = run(ul.Monitor(model), lambda: model(torch.ones(4, 8)).sum().backward(), times=3)
    assert found[1].flops == 5 * MM  # both forwards, both gradients of weights, and that of the product


def test_a_compiled_model_is_not_counted() -> None:
    model = nn.Linear(4, 4)
    m = ul.Monitor(torch.compile(model), peak_flops=1e9)
    assert m.summary().not_available["MFU"].startswith("the model is compiled")
    m.step_begin()
    m.step_end()
    m.close()
    assert m.summary().recomputed_units is None


def test_mismatches_that_the_runtime_finds() -> None:
    shift = iter(range(100))

    def changing(x: Tensor) -> Tensor:
        return (x + float(next(shift))).sin()

    x = torch.ones(4, requires_grad=True)
    m = monitor(Clock(), nn.Linear(1, 1))
    with pytest.warns(ul.UllageWarning, match="gave other values"), m.step():
        ul.checkpoint(changing, x).sum().backward()
    with pytest.raises(ul.ReplayError), m.step():
        ul.checkpoint(lambda x: changing(x), x, determinism_check="values").sum().backward()
    s = m.summary()
    assert (s.replay_mismatches, s.failed_steps, s.steps) == (2, 1, 1)


def test_totals_only_grow() -> None:
    before = totals.now()
    model, x = Two(), torch.ones(4, 8, requires_grad=True)
    ul.checkpoint(model, x).sum().backward()
    assert [b - a for a, b in zip(before, totals.now(), strict=True)] == [1, 0, 0, 0, 0, 0]
