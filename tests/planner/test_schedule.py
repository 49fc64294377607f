"""The timeline of a schedule, on models small enough to follow by hand."""

from __future__ import annotations

import pytest

from tests.planner.instances import unit_chain
from ullage.mechanisms import KEEP, RECOMPUTE
from ullage.solver._instance import OptionFacts, StepModel
from ullage.solver._schedule import Item, Run, Schedule, Single, check, evaluate, flat


def _chain(units: int) -> StepModel:
    """Inputs of 10 bytes; keep holds 30, a recorded forward or a backward needs 50, a plain forward 15; 1 s each."""
    bases = [10 * (u + 1) for u in range(units)]
    options = tuple(
        (OptionFacts(KEEP, 30, base + 50, 0.0, 50), OptionFacts(RECOMPUTE, 0, base + 50, 0.75)) for base in bases
    )
    return StepModel(
        tuple("abcdefgh"[:units]),
        options,
        (10, *(0,) * units),
        1.0,
        linked=(False, *(True,) * (units - 1)),
        link_bytes=(0, *(10,) * (units - 1)),
        forward_seconds=(1.0,) * units,
        forward_peak_bytes=(15,) * units,
        backward_base_bytes=tuple(bases),
    )


@pytest.mark.parametrize("choice", [(0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 0)])
def test_a_flat_schedule_is_an_assignment(choice: tuple[int, ...]) -> None:
    model = _chain(3)
    peak, seconds = evaluate(model, flat(choice))
    assert peak == model.peak(list(choice))
    assert seconds == 0.75 * sum(choice)


def test_a_run_of_two() -> None:
    # rebuilt, a is recorded and holds 30; b's forward is recorded: a's input, b's input, 30, 50
    items: tuple[Item, ...] = Single(0, 0), Single(1, 0)
    assert evaluate(_chain(2), (Run(0, 1, items),)) == (10 + 10 + 30 + 50, 2.0)
    # a only keeps its input: it is run to get b's input, and run again by its own replay; b by its own replay
    items = Single(0, 1), Single(1, 1)
    assert evaluate(_chain(2), (Run(0, 1, items),)) == (10 + 10 + 50, 1.0 + 0.75 + 0.75)


def test_what_a_run_does_not_hold_is_free_for_the_units_after_it() -> None:
    model = _chain(4)
    rebuilt = (Single(0, 1), Single(1, 1), Single(2, 1))
    # at d: its own input and a's (40 in the base, less those of b and c), and 50
    assert evaluate(model, (Run(0, 2, rebuilt), Single(3, 1)))[0] == max(20 + 50, 10 + 20 + 50)
    assert evaluate(model, flat((1, 1, 1, 1)))[0] == 40 + 50


def test_nested_runs_run_forwards_again_and_again() -> None:
    model = _chain(4)
    inner = Run(0, 2, (Run(0, 1, (Single(0, 1), Single(1, 1))), Single(2, 1)))
    nested = (Run(0, 3, (inner, Single(3, 1))),)
    # only a's input and the one in use are ever there: a, b, c run for d; a, b for c; a for b; and 4 replays
    assert evaluate(model, nested) == (10 + 10 + 50, 3 + 2 + 1 + 4 * 0.75)


def test_the_first_forward_counts() -> None:
    model = _chain(3)
    wide = StepModel(**{**model.__dict__, "forward_peak_bytes": (15, 200, 15)})
    # b's first forward: a's input, its own, 200; when c is rebuilt the same
    assert evaluate(wide, (Run(0, 2, (Single(0, 1), Single(1, 1), Single(2, 1))),))[0] == 10 + 10 + 200
    assert evaluate(wide, flat((1, 1, 1)))[0] == 30 + 50  # it is in `own_peak_bytes` there


def test_peaks_outside_units_see_what_is_not_held() -> None:
    model = _chain(3)
    loss = StepModel(**{**model.__dict__, "outside_bytes": (10, 0, 0, 500)})
    rebuilt = (Single(0, 1), Single(1, 1), Single(2, 1))
    assert evaluate(loss, flat((1, 1, 1)))[0] == 500
    assert evaluate(loss, (Run(0, 2, rebuilt),))[0] == 480
    assert evaluate(loss, flat((0, 1, 0)))[0] == 560


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((Single(0, 1),), "unit 1 is missing"),
        ((Single(1, 1), Single(0, 1), Single(2, 1)), "unit 0 comes next"),
        ((Single(0, 1), Single(1, 2), Single(2, 1)), "unit 1 has no option 2"),
        ((Single(0, 1), Single(1, 1), Run(2, 3, ())), "unit 2 comes next"),
        ((Run(0, 0, (Single(0, 1),)), Single(1, 1), Single(2, 1)), "units 0 to 0 can't be a run"),
        ((Single(0, 1), Run(1, 2, (Single(1, 1), Single(2, 1)))), "units 1 to 2 can't be a run"),
        ((Run(0, 1, (Single(0, 1),)), Single(2, 1)), "unit 1 is missing"),
        ((Run(0, 1, (Run(0, 1, (Single(0, 1), Single(1, 1))),)), Single(2, 1)), "the last of units 0 to 1 must be"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: Schedule, message: str) -> None:
    model = unit_chain(3)
    model = StepModel(**{**model.__dict__, "options": _chain(3).options, "linked": (False, True, False)})
    with pytest.raises(ValueError, match=message):
        check(model, schedule)


def test_links_need_their_facts() -> None:
    model = unit_chain(3)
    with pytest.raises(ValueError, match="links need"):
        StepModel(**{**model.__dict__, "forward_seconds": ()})
