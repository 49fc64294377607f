"""Steps out of order, steps that raise, and what a monitor leaves behind: nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import ullage as ul
from tests.monitor.running import Clock, SlowProbe, dispatch_modes, monitor, steps
from tests.small import tiny
from ullage.workload import run_step


def test_steps_do_not_overlap() -> None:
    m = monitor(Clock(), first_step=7)
    with pytest.raises(ul.MonitorError, match=r"no step is open to end; call step_begin\(\) first"):
        m.step_end()
    m.step_begin()
    with pytest.raises(ul.MonitorError, match=r"step 7 is open: .* step_fail\(\) if it raised"):
        m.step_begin()
    m.step_end()
    with pytest.raises(ul.MonitorError, match="no step is open to drop"):
        m.step_fail()
    with pytest.raises(ul.MonitorError, match="step 8 is open"), m.step(), m.step():
        pass  # the outer one fails with it
    assert (m.summary().steps, m.summary().failed_steps) == (1, 1)
    m.close()
    m.close()
    with pytest.raises(ul.MonitorError, match="this monitor is closed"), m.step():
        pass


def test_begin_and_end_are_the_same_as_with() -> None:
    clock = Clock()
    m = monitor(clock)
    m.step_begin(samples=2)
    clock.now += 0.5
    m.step_end(loss=3.0)
    steps(m, clock, [0.5], samples=2)
    one, two = m.summary() and m._tally.ring
    assert one.step_time_s == two.step_time_s == 0.5 and one.samples == two.samples == 2 and one.loss == 3.0


def test_a_step_that_raises_is_dropped() -> None:
    clock = Clock()
    m = monitor(clock)
    for kind in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(kind), m.step():
            raise kind
    steps(m, clock, [0.5])
    m.step_begin()
    m.step_fail(MemoryError())
    m.step_begin()
    m.close()  # open still
    s = m.summary()
    assert (s.steps, s.failed_steps, s.step_seconds) == (1, 5, 0.5)


def test_break_and_continue_end_a_step() -> None:
    clock = Clock()
    m = monitor(clock)
    for k in range(3):
        with m.step():
            clock.now += 1
            if k == 0:
                continue
            break
    assert m.summary().steps == 2


def test_two_monitors_at_once() -> None:
    clock = Clock()
    a, b = monitor(clock), monitor(clock)
    with a.step():
        clock.now += 1
        with b.step():
            clock.now += 2
    b.step_begin()
    with a.step():
        clock.now += 4
    b.step_end()
    assert [r.step_time_s for r in (a.summary() and a._tally.ring)] == [3.0, 4.0]
    assert [r.step_time_s for r in (b.summary() and b._tally.ring)] == [2.0, 4.0]


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_stays_on_the_model_or_in_torch(raises: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    hooks = {n: {k: dict(v) for k, v in vars(m).items() if k.endswith("_hooks")} for n, m in model.named_modules()}
    everywhere = dict(torch.nn.modules.module._global_forward_hooks)
    m = ul.Monitor(model)
    for k in range(3):
        try:
            with m.step():
                model(torch.ones(2, 4)).sum().backward()
                assert dispatch_modes() == (
                    k == 1 or (raises and k > 1)
                )  # the step whose ops are counted; again if it raised
                if raises:
                    raise ValueError
        except ValueError:
            pass
        assert dispatch_modes() == 0
    m.close()
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == before
    assert {
        n: {k: dict(v) for k, v in vars(m).items() if k.endswith("_hooks")} for n, m in model.named_modules()
    } == hooks
    assert torch.nn.modules.module._global_forward_hooks == everywhere
    assert all(not p._backward_hooks for p in model.parameters())
    held = weakref.ref(model)
    del model, before, hooks
    gc.collect()
    assert held() is None  # the monitor does not keep it alive
    assert m.summary().failed_steps == 3 * raises


def test_the_counted_step_is_the_next_one_if_it_raises() -> None:
    model = nn.Linear(4, 4)
    m = ul.Monitor(model, warmup=1)
    with pytest.raises(ValueError), m.step():
        model(torch.ones(2, 4)).sum().backward()
        raise ValueError
    for _ in range(2):
        with m.step():
            model(torch.ones(2, 4)).sum().backward()
    s = m.summary()
    assert s.flops_per_step == 2 * (2 * 2 * 4 * 4)  # forward, and the weight's gradient
    assert (s.steps, s.warmup_steps, s.window_steps) == (2, 1, 1)


def test_training_is_bitwise_the_same() -> None:
    """Under a plan with selective replays, whose first steps learn and prove logs, one of them under our dispatch mode."""
    found = []
    for watched in (False, True):
        work = tiny()
        plan = ul.plan(work, policy="selective", costs="roofline")
        inst = work.instance()
        torch.manual_seed(3)
        with plan.apply(work.model) as handle:
            m = ul.Monitor(handle if watched else work.model)
            losses = []
            for _ in range(5):
                if watched:
                    with m.step() as s:
                        loss = run_step(inst)
                        s.loss(loss)
                else:
                    loss = run_step(inst)
                losses.append(loss.item())
            report = handle.report()
        found.append(
            (
                losses,
                [p.clone() for p in work.model.parameters()],
                [(u.recomputed, u.skipped_ops) for u in report.units],
            )
        )
        if watched:
            assert [r.loss for r in (m.summary() and m._tally.ring)] == losses[2:]
    (a, b, c), (x, y, z) = found
    assert a == x and c == z and all(torch.equal(p, q) for p, q in zip(b, y, strict=True))
    assert any(skipped for _, skipped in c)


def test_inference_between_steps_is_not_seen() -> None:
    clock, model = Clock(), nn.Linear(4, 4)
    m = monitor(clock, model)
    steps(m, clock, [1.0])
    model.eval()
    with torch.no_grad():
        model(torch.ones(1, 4))
    clock.now += 16.0
    model.train()
    steps(m, clock, [1.0])
    assert [r.wait_s for r in (m.summary() and m._tally.ring)] == [None, 16.0]


def test_losses_are_looked_at_when_the_device_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    probe = SlowProbe(clock)
    monkeypatch.setattr("ullage.monitor._monitor.probe_for", lambda *_: probe)
    m = monitor(clock)
    losses = [torch.tensor(x) for x in (1.0, 5.0, 2.0)]
    for loss in losses:
        with m.step() as s:
            s.loss(loss)
            clock.now += 1
    assert m.summary().steps == 0  # the device has reached none
    losses[1].fill_(float("inf"))
    probe.reached = 2
    assert (m.summary().steps, m.summary().nonfinite_losses) == (2, 1)
    assert [(r.loss, r.nonfinite_loss) for r in m._tally.ring] == [(1.0, False), (None, True)]
    m.close()
    assert probe.waited == [2]  # at the end, the rest is waited for
    assert m.summary().steps == 3


def test_records_are_made_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    m = monitor(clock)
    steps(m, clock, [0.001] * 63)
    assert m._tally.steps == 0 and len(m._pending) == 63
    steps(m, clock, [0.001])
    assert m._tally.steps == 64
    steps(m, clock, [0.5, 0.25])
    assert m._tally.steps == 64
    steps(m, clock, [0.25])  # a second since the last time
    assert m._tally.steps == 67


def test_the_mean_of_micro_batches() -> None:
    m = monitor(Clock())
    for losses in ([1.0, 2.0], [1.0, float("nan")], []):
        with m.step() as s:
            for loss in losses:
                s.loss(loss)
    assert [(r.loss, r.nonfinite_loss) for r in (m.summary() and m._tally.ring)] == [
        (1.5, False),
        (None, True),
        (None, False),
    ]
    assert m.summary().nonfinite_losses == 1


@pytest.mark.parametrize(
    "loss, message",
    [
        (torch.ones(2), r"loss: expected one number, got a tensor of shape \(2,\)"),
        ("1", "loss: expected a number or a tensor of one element, got str"),
    ],
)
def test_a_loss_that_is_none(loss: Any, message: str) -> None:
    m = monitor(Clock())
    m.step_begin()
    with pytest.raises(ul.ArgumentError, match=message):
        m.step_end(loss)
    with pytest.raises(ul.ArgumentError, match=message), m.step() as s:
        s.loss(loss)
    m.step_begin()  # the steps before were dropped
    m.step_end()
    assert (m.summary().steps, m.summary().failed_steps) == (1, 2)


@pytest.mark.parametrize("how", ["with", "begin"])
@pytest.mark.parametrize(
    "given",
    [{"samples": -1}, {"samples": True}, {"tokens": 1.5}, {"tokens": torch.tensor(3)}, {"flops": 0}, {"flops": "1"}],
)
def test_arguments_of_a_step(how: str, given: dict[str, Any]) -> None:
    m = monitor(Clock())
    with pytest.raises(ul.ArgumentError, match=f"^{next(iter(given))}="):
        if how == "begin":
            m.step_begin(**given)
        else:
            with m.step(**given):
                pass
    with m.step():
        pass
    assert m.summary().steps == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model": 3}, "model: expected a torch.nn.Module or the Handle of a plan, got int"),
        ({"model": nn.Linear(1, 1, device="meta")}, "model: is on meta; a Monitor watches steps on a CPU or on CUDA"),
        ({"samples_per_step": 1.0}, "samples_per_step=1.0: expected a whole number of 0 or more"),
        ({"tokens_per_step": -1}, "tokens_per_step=-1"),
        ({"flops_per_step": float("nan")}, "flops_per_step=nan"),
        ({"peak_flops": 0}, "peak_flops=0: expected FLOP/s above zero"),
        ({"warmup": -1}, "warmup=-1: expected a whole number of 0 or more"),
        ({"window": 0}, "window=0: expected a whole number of 1 or more"),
        ({"log_every": 0}, "log_every=0"),
        ({"first_step": 1.5}, "first_step=1.5"),
        ({"loggers": [3]}, r"loggers: a int has no log\(metrics, step\); wrap a writer or run in TensorBoardLogger"),
        ({"loggers": 3}, "loggers: a int has no log"),
    ],
)
def test_arguments(given: dict[str, Any], message: str) -> None:
    model = given.pop("model", nn.Linear(1, 1))
    with pytest.raises(ul.ArgumentError, match=message):
        ul.Monitor(model, **given)


def test_a_device_that_is_not_in_the_table() -> None:
    with pytest.raises(ul.DeviceError, match="h20"):
        ul.Monitor(nn.Linear(1, 1), peak_flops="h20")


def test_a_handle_whose_plan_was_removed() -> None:
    work = tiny()
    handle = ul.plan(work, policy="every_block", costs="roofline").apply(work.model)
    outer = nn.Sequential(work.model)  # as DDP wraps one
    assert ul.Monitor(outer).header.plan == ul.Monitor(handle).header.plan == handle.plan.digest
    handle.remove()
    assert ul.Monitor(work.model).header.plan == ""
    with pytest.raises(ul.ArgumentError, match="model: this handle's plan was removed"):
        ul.Monitor(handle)
