"""What the planner hands on are values: nobody assigns to a study, and an executed step is found out once."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ullage as ul
from tests.small import tiny
from ullage.capture import Session
from ullage.mechanisms import KEEP, RECOMPUTE
from ullage.planner.decide._confirm import optimal
from ullage.planner.decide._planner import decide, study_and_plan
from ullage.planner.plan._budget import Budget
from ullage.planner.study._choices import Choices
from ullage.planner.study._executed import Executed, StepCapture, Steps
from ullage.planner.study._prepare import prepare
from ullage.planner.study._study import Study

SOURCE = Path(ul.__file__).parent


@pytest.fixture(scope="module")
def s() -> Study:
    return prepare(tiny(), costs="roofline")


@pytest.mark.parametrize("kind", [Budget, Choices, Executed, StepCapture, Steps, Study])
def test_all_fields_are_frozen(kind: Any) -> None:
    value = object.__new__(kind)
    assert dataclasses.fields(kind)
    for f in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, f.name, None)


def _parts(target: ast.expr) -> Iterator[ast.expr]:
    """What is assigned to, one by one."""
    if isinstance(target, ast.Tuple | ast.List):
        for element in target.elts:
            yield from _parts(element)
    else:
        yield target.value if isinstance(target, ast.Starred) else target


def _owners(target: ast.expr) -> Iterator[ast.expr]:
    """Of `a.b[c].d`: `a.b[c]`, `a.b` and `a`."""
    while isinstance(target, ast.Attribute | ast.Subscript):
        target = target.value
        yield target


def _is_study(node: ast.expr) -> bool:
    """`s`, `study`, or an attribute of that name: the names that studies have in ullage."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in ("s", "study")


def assigned(tree: ast.AST) -> list[str]:
    """What is assigned, deleted or set by name inside a study: attributes, and items of its attributes."""
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
            targets = [node.target]
        parts = [part for target in targets for part in _parts(target)]
        found += [ast.unparse(part) for part in parts if any(map(_is_study, _owners(part)))]
        if isinstance(node, ast.Call) and "setattr" in ast.unparse(node.func) and _is_study(node.args[0]):
            found.append(ast.unparse(node))
    return found


def test_nothing_assigns_to_a_study() -> None:
    files = [p for p in SOURCE.rglob("*.py") if "Study" in p.read_text() and p.name != "_study.py"]
    assert len(files) > 20
    assert {str(p): found for p in files if (found := assigned(ast.parse(p.read_text())))} == {}


@pytest.mark.parametrize(
    "line",
    ["s.model = None", "p.s.options['a'] = []", "s.unlinked |= x", "a, s.tier = 1, 2", "del s.windows[k]",
     "setattr(s, 'tier', 1)", "object.__setattr__(s, 'tier', 1)", "self.study.units = []"],
)  # fmt: skip
def test_the_search_finds_assignments(line: str) -> None:
    assert len(assigned(ast.parse(line))) == 1


def test_a_step_is_executed_once(s: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    assignment = {u.fqn: RECOMPUTE if u.block else KEEP for u in s.units}
    first = s.execute_fresh(assignment)

    def none(*_: Any, **__: Any) -> None:
        raise AssertionError("a step was run")

    monkeypatch.setattr(Session, "run", none)
    again = s.execute_fresh({f: o for f, o in assignment.items() if o != KEEP})  # unnamed units are kept
    assert dataclasses.replace(again.later, assignment=assignment) == first.later
    assert s.execute(assignment) == first.later  # a later step, in passing
    assert s.execute_fresh(assignment, window_bytes=1 << 20) == first  # nothing is offloaded
    assert s.plain_steps.assignment == dict.fromkeys([u.fqn for u in s.units], KEEP)


def test_what_has_been_decided_does_not_hang_on_what_was_decided_before(s: Study) -> None:
    peak = s.plain_steps.peak_bytes
    alone = decide(prepare(tiny(), costs="roofline"), Budget(peak * 7 // 10))
    together = [decide(s, Budget(peak * share // 100)) for share in (85, 70)]
    assert together[1].digest == alone.digest != together[0].digest


def test_choices_are_a_value(s: Study) -> None:
    """Deciding under other choices leaves those of the study alone."""
    before = {f: list(o) for f, o in Choices().of(s).items()}
    budget = Budget(s.plain_steps.peak_bytes * 7 // 10)
    narrow = Choices({f: [o for o in options if o in (KEEP, RECOMPUTE)] for f, options in before.items()})
    steps, _ = optimal(s, narrow, budget)
    assert {o.action for o in steps.assignment.values()} <= {KEEP.action, RECOMPUTE.action}
    assert steps.peak_bytes <= budget.room
    assert {f: o[: len(before[f])] for f, o in Choices().of(s).items()} == before


def test_a_budget_keeps_its_reserve_all_the_way(s: Study) -> None:
    plain = s.plain_steps.peak_bytes
    budget = Budget(plain, plain // 4)
    plan = decide(s, budget)
    assert (plan.budget_bytes, plan.headroom_bytes) == (plain, plain // 4)
    assert plan.predicted.peak_bytes <= budget.room == plain - plain // 4
    with pytest.raises(ul.BudgetInfeasible, match="of it are headroom") as caught:
        decide(s, Budget(plain, plain - 1))
    assert caught.value.budget_bytes == plain < caught.value.smallest_bytes


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each run of a session has run."""
    run, found = Session.run, list[int]()

    def counted(self: Session, settings: Any = None, steps: int = 1, **options: Any) -> None:
        found.append(steps)
        run(self, settings, steps, **options)

    monkeypatch.setattr(Session, "run", counted)
    return found


def test_a_plan_runs_each_step_once(ran: list[int]) -> None:
    """The plain step, one step per option, the choice that fits, and the lever that is tried; no step twice.

    Before executed steps were values, it took 18.
    """
    s, plan = study_and_plan(tiny(), "70% of plain", costs="roofline")
    assert any(d.action != "keep" for d in plan.decisions)
    chosen, lever = 1, 1
    assert ran == [2, *[1] * (len(s.captures) - 1), *[2] * (chosen + lever)]
    assert sum(ran) == 17


def test_a_frontier_runs_two_steps_per_plan_and_policy(ran: list[int]) -> None:
    found = ul.frontier(tiny(), 6, costs="roofline")
    plans = {p.plan.digest for p in found.points} | {p.policy for p in found.policies}
    afresh = [n for n in ran[1:] if n == 2]
    assert ran[0] == 2 and len(afresh) <= len(plans)
    assert sum(ran) <= 35
