"""A plan knows which modules were in evaluation mode: it says so, and what runs in another mode is named or refused."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from ullage.apply import Handle


class Inner(nn.Module):
    """Reads its mode in a function below its forward, and has no layer that does."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        def dropped(t: Tensor) -> Tensor:
            return F.dropout(t, 0.5, training=self.training)

        return dropped(self.l(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(Inner(), nn.BatchNorm1d(16), nn.GELU()) for _ in range(3))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.drop(x).square().mean()


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
ALL = ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1", "blocks.2.0", "blocks.2.1", "drop"]


@functools.cache
def _planned(training: bool) -> ul.Plan:
    return ul.plan(ul.Workload(Model().train(training), X), policy="every_block", costs="roofline")


def _plan(model: nn.Module) -> ul.Plan:
    """The plan of a model all of whose modules are in one mode."""
    return _planned(model.training)


def _said(model: nn.Module, steps: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(X).backward()
    return [str(w.message) for w in caught]


def test_a_plan_in_training_mode_has_no_note_and_no_entry() -> None:
    plan = _plan(Model())
    assert plan.evaluation == [] and not any("evaluation" in n for n in plan.notes)


def test_a_plan_and_a_profile_in_evaluation_mode_say_so_and_name_what_reads_the_mode() -> None:
    model = Model().eval()
    plan = _plan(model)
    assert plan.evaluation == ALL
    note = (
        "blocks.0.0, blocks.0.1, blocks.1.0 and 4 more modules were in evaluation mode and planned so; if the model trains in training "
        "mode, call model.train() and plan again"
    )
    assert note in plan.notes and note in ul.profile(ul.Workload(model, X), costs="roofline").notes


def test_the_plan_keeps_it_in_its_file(tmp_path: object) -> None:
    plan = _plan(Model().eval())
    plan.save(f"{tmp_path}/plan.json")
    assert ul.Plan.load(f"{tmp_path}/plan.json").evaluation == ALL


CHANGES: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object], list[str]]] = {
    "all to training": (lambda m: m.eval(), lambda m: m.train(), ["blocks.0.0, blocks.0.1, drop: in training", "blocks.1.0, ", "blocks.2.0, "]),
    "all to evaluation": (lambda m: m, lambda m: m.eval(), []),  # saves the same or less
    "one layer": (lambda m: m.eval(), lambda m: m.get_submodule("blocks.1.1").train(), ["blocks.1.1: in training mode, but planned in evaluation mode"]),
    "outside all units": (lambda m: m.eval(), lambda m: m.get_submodule("drop").train(), ["drop: in training mode, but planned in evaluation"]),
    "what reads no mode": (lambda m: m, lambda m: [m.get_submodule(n).train(False) for n in ("blocks.0.2", "blocks.1.0.l")], []),
    "nothing": (lambda m: m.eval(), lambda m: m, []),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_each_module_in_another_mode_is_named_once_at_run_time(change: str) -> None:
    before, after, said = CHANGES[change]
    model = Model()
    before(model)
    with _applied(model):
        after(model)
        heard = _said(model, steps=2)
    assert [a.startswith(b) for a, b in zip(heard, said, strict=True)] == [True] * len(said), heard
    assert all("results stay exact, but the planned peak is at risk: call model." in h for h in heard)


def _applied(model: nn.Module) -> Handle:
    """The plan made in the model's mode; applying it while both are in evaluation mode warns, from the line that applies."""
    if model.training:
        return _plan(model).apply(model)
    with pytest.warns(
        ul.UllageWarning, match=r"^blocks.0.0, .* and 4 more modules: in evaluation mode, as planned"
    ) as said:
        handle = _plan(model).apply(model)
    assert [w.filename for w in said] == [__file__]
    return handle


def test_a_plan_in_evaluation_mode_is_applied_to_a_model_that_trains() -> None:
    """They are named when it is applied, and not again at the first forward."""
    plan, model = _planned(False), Model()
    with pytest.warns(ul.UllageWarning, match=r"^blocks.0.0, .*: in training mode, but planned in evaluation") as said:
        handle = plan.apply(model)
    assert [w.filename for w in said] == [__file__]
    with handle:
        assert _said(model) == []


def test_layers_that_are_frozen_in_evaluation_mode_are_no_risk() -> None:
    model = Model()
    model.get_submodule("blocks.0.1").eval()
    plan = ul.plan(ul.Workload(model, X), policy="every_block", costs="roofline")
    assert plan.evaluation == ["blocks.0.1"]
    with plan.apply(model):
        assert _said(model) == []


def test_no_word_where_no_graph_is_built() -> None:
    model = Model()
    with _plan(model).apply(model), torch.no_grad():
        model.eval()
        assert _said_without_backward(model) == []


def _said_without_backward(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(X)
    return [str(w.message) for w in caught]


def test_measuring_a_plan_in_another_mode_is_refused() -> None:
    model = Model().eval()
    plan, work = _plan(model), ul.Workload(model, X)
    assert ul.measure(work, plan, steps=1).peak_bytes > 0
    model.train()
    for call in (lambda: ul.measure(work, plan, steps=1), lambda: ul.record_snapshot(work, plan)):
        with pytest.raises(
            ul.PlanMismatch, match=r"^blocks.0.0, .*: in training mode, but planned in evaluation mode, so the bytes"
        ):
            call()
    with pytest.raises(
        ul.PlanMismatch, match=r"^blocks.0.0: in training mode, but planned in evaluation mode \(7 modules"
    ):
        ul.timeline(work, plan)
    plan_in_training = _plan(model)
    model.eval()
    with pytest.raises(
        ul.PlanMismatch,
        match=r"in evaluation mode, but planned in training mode, .*; call model.eval\(\) before planning",
    ):
        ul.measure(work, plan_in_training, steps=1)
    model.train()
    assert model(X).grad_fn is not None  # the plan is no longer in force, and the model runs
    with pytest.warns(ul.UllageWarning, match="in training mode"):
        assert ul.verify(work, plan, steps=1).ok


def test_a_step_that_sets_the_mode_itself_is_planned_as_it_runs() -> None:
    def step(model: nn.Module, batch: Tensor) -> None:
        model.train()
        model(batch).backward()
        model.eval()

    model = Model().eval()
    work = ul.Workload(model, X, step=step)
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert plan.evaluation == []
    assert ul.measure(work, plan, steps=1).peak_bytes > 0
