"""What makes a replay exact, and that the tests would notice if it were missing."""

from __future__ import annotations

import pytest
import torch

import ullage as ul
from tests.broken import without_autocast, without_rng, without_state
from tests.small import tiny
from tests.zoo import workload


def test_without_buffer_restore_batch_norm_statistics_differ(monkeypatch) -> None:
    work = workload("resnet")
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert ul.verify(work, plan).ok
    with without_state(monkeypatch):
        check = ul.verify(work, plan)
    assert not check.ok
    assert any("running_mean" in d.name for d in check.differences)


def test_without_rng_restore_dropout_gradients_differ(monkeypatch) -> None:
    work = tiny()
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert ul.verify(work, plan).ok
    with without_rng(monkeypatch):
        assert not ul.verify(work, plan).ok


def test_without_autocast_restore_it_fails(monkeypatch) -> None:
    work = tiny(autocast=torch.bfloat16)
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert ul.verify(work, plan).ok
    with (
        without_autocast(monkeypatch),
        pytest.raises(ul.VerifyError, match="the planned step raises, and the plain one does not: .*float32"),
    ):
        ul.verify(work, plan)


def test_unit_by_unit() -> None:
    work = workload("gpt")
    plan = ul.plan(work, policy="selective", costs="roofline")
    check = ul.verify(work, plan, scope="units")
    assert check.ok and check.replays == 4 and check.scope == "units"


@pytest.mark.slow
def test_everything_is_left_as_found() -> None:
    """Alone shows it of plan, verify and measure in a row on one model with buffers and gradients."""
    work = workload("resnet")
    work.model(work.batch).sum().backward()
    before = {n: t.clone() for n, t in work.model.state_dict().items()}
    grads = [p.grad for p in work.model.parameters()]
    rng = torch.get_rng_state()
    plan = ul.plan(work, policy="every_block", costs="roofline")
    ul.verify(work, plan)
    ul.measure(work, plan, steps=1)
    assert all(torch.equal(before[n], t) for n, t in work.model.state_dict().items())
    assert all(p.grad is g for p, g in zip(work.model.parameters(), grads, strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert all("forward" not in m.__dict__ for m in work.model.modules())


def test_replay_casts_weights_that_autocast_had_cached() -> None:
    work = workload("shared", autocast=torch.bfloat16)  # its second call finds the casts of the first
    plan = ul.plan(work, policy="selective", costs="roofline")
    check = ul.verify(work, plan)
    assert check.ok and check.replays > 0 and not check.unstable


@pytest.mark.filterwarnings("default")
def test_routing_changed_in_place_is_kept_and_hooks_go() -> None:
    work = workload("mixtral")  # normalises topk's values in place; hooks its routers in the first forward
    before = [len(m._forward_hooks) for m in work.model.modules()]
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert all(d.keeps_routing for d in plan.decisions if d.action != "keep")
    check = ul.verify(work, plan)
    assert check.ok and check.replays > 0 and not check.unstable
    assert before == [len(m._forward_hooks) for m in work.model.modules()]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "moe"])
def test_dropout_is_replayed(name: str) -> None:
    """Alone has every unit that draws replayed; the plans of `test_prediction` choose some."""
    work = workload(name)
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in work.model.modules())
    profile = ul.profile(work, costs="roofline")
    for policy in ("every_block", "selective"):
        check = ul.verify(work, ul.plan(work, policy=policy, profile=profile))
        assert check.ok and check.replays > 0 and not check.unstable
