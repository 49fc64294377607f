"""State, inference, shapes, and everything `apply` refuses."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import ullage as ul
from tests.zoo import text_ids, workload
from ullage.workload import run_step


@pytest.fixture(scope="module")
def plan() -> ul.Plan:
    return ul.plan(workload("gpt"), policy="every_block", costs="roofline")


def test_state_is_unchanged_and_copies_are_plain(plan: ul.Plan) -> None:
    model = workload("gpt").model
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    with plan.apply(model) as handle:
        assert list(model.state_dict()) == keys and [n for n, _ in model.named_modules()] == names
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                for p in twin.parameters():
                    p.zero_()
            assert twin(text_ids(1, 8)).abs().max() == 0  # its own weights
            twin(text_ids(1, 8)).sum().backward()
        assert all(u.fired == 0 for u in handle.report().units)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_remove_puts_back_the_very_forward(plan: ul.Plan) -> None:
    model = workload("gpt").model
    block = model.blocks[0]
    own = block.forward
    block.forward = own
    handle = plan.apply(model)
    assert block.forward is not own
    handle.remove()
    assert block.forward is own


def test_inference_is_untouched(plan: ul.Plan) -> None:
    model = workload("gpt").model.eval()
    ids = text_ids(2, 64)
    with torch.no_grad():
        before = model(ids)
    with plan.apply(model) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            assert torch.equal(model(ids), before)
        with torch.inference_mode():
            assert torch.equal(model(ids), before)
        assert all(u.fired == 0 for u in handle.report().units)


def test_report_counts(plan: ul.Plan) -> None:
    work = workload("gpt")
    with plan.apply(work.model) as handle:
        run_step(work.instance())
        blocks = [u for u in handle.report().units if u.action == "recompute"]
    assert [(u.fired, u.recomputed) for u in blocks] == [(1, 1)] * 4


def test_disable(plan: ul.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload("gpt")
    with plan.apply(work.model) as handle:
        monkeypatch.setenv("ULLAGE_DISABLE", "1")
        run_step(work.instance())
        assert all(u.fired == 0 for u in handle.report().units)


def test_second_apply_and_changed_models_are_refused(plan: ul.Plan) -> None:
    model = workload("gpt").model
    with plan.apply(model):
        with pytest.raises(ul.ApplyError, match="applied to this model already"):
            plan.apply(model)
    model.embed.weight.requires_grad_(False)
    with pytest.raises(ul.PlanMismatch, match="embed.weight: requires_grad"):
        plan.apply(model)
    with pytest.raises(ul.PlanMismatch, match="class"):
        plan.apply(workload("unet").model)


def test_a_longer_batch_warns_once_and_stays_exact() -> None:
    work = workload("gpt")
    plan = ul.plan(work, "75% of plain", costs="roofline")
    big = text_ids(12, 128)

    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        work.model.zero_grad()
        work.model(big).sum().backward()
        return work.model.embed.weight.grad.clone()

    expected = gradient()
    with plan.apply(work.model):
        with pytest.warns(ul.UllageWarning, match="at risk"):
            assert torch.equal(gradient(), expected)
        assert torch.equal(gradient(), expected)


@pytest.mark.filterwarnings("default")
def test_a_checkpointed_model_is_refused() -> None:
    work = workload("llama")
    work.model.gradient_checkpointing_enable()
    with pytest.raises(ul.AlreadyCheckpointed, match="Hugging Face"):
        ul.profile(work, costs="roofline")


def test_torchs_own_checkpoint_is_noticed() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False).sum()

    with pytest.raises(ul.AlreadyCheckpointed, match="inner"):
        ul.profile(ul.Workload(Own(), torch.ones(2, 4)), costs="roofline")
