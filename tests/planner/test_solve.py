"""The solver against every schedule of small models; its promises on large ones."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.instances import MB, blocks, frontier, long_inputs, random_model, unit_chain
from ullage.solver._bounds import TopLevel
from ullage.solver._chain import chain_of
from ullage.solver._instance import StepModel
from ullage.solver._schedule import Run, check, evaluate
from ullage.solver._solve import Solution, _Solver, smallest, solve


def _agrees(model: StepModel, rng: random.Random, budgets: int) -> None:
    """The least peak, and the least seconds at some budgets where these change and between them, are found and proved."""
    best = frontier(model)
    least = smallest(model)
    assert (least.peak_bytes, least.seconds) == best[0]
    assert least.proved
    assert solve(model, best[0][0] - 1) is None
    for i in sorted(rng.sample(range(len(best)), min(budgets, len(best)))):
        peak, seconds = best[i]
        room = best[i + 1][0] - peak if i + 1 < len(best) else 5
        found = solve(model, peak + rng.randrange(room))
        assert found is not None
        assert found.seconds == seconds == found.lower_bound
        assert found.proved
        assert found.gap == 0.0
        assert evaluate(model, found.schedule) == (found.peak_bytes, seconds)


@pytest.mark.parametrize("seed", range(10))
def test_every_schedule_of_small_models(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        units = rng.randint(2, 5)
        _agrees(random_model(rng, units, 3 if units < 4 else 2), rng, budgets=3)


@pytest.mark.parametrize("seed", range(6))
def test_every_schedule_of_models_that_need_nested_runs(seed: int) -> None:
    rng = random.Random(seed)
    nested = 0
    for _ in range(25):
        model = long_inputs(rng, rng.choice([3, 4, 5, 6]))
        _agrees(model, rng, budgets=100)
        top = smallest(model).schedule
        nested += any(isinstance(inner, Run) for item in top if isinstance(item, Run) for inner in item.items)
    assert nested >= 2


def test_peaks_between_the_first_forwards_of_a_run_count() -> None:
    """Where options hold less than recompute, none of what a run's rebuilding asks for is as much."""
    model = unit_chain(3)
    model = replace(
        model,
        options=tuple((replace(o[0], held_bytes=-4),) for o in model.options),
        link_bytes=(0, 10, 10),
        outside_bytes=(0, 100, 0, 118),
    )
    assert smallest(model).peak_bytes == frontier(model)[0][0] == 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_every_schedule_of_thousands_of_small_models(seed: int) -> None:
    """Alone tries thousands of random models, at 100 budgets each; the faster ones try some tens."""
    rng = random.Random(seed)
    for _ in range(300):
        units = rng.randint(2, 5)
        _agrees(random_model(rng, units, 4 if units < 4 else 2, linked=0.95), rng, budgets=100)


@pytest.mark.parametrize("seed", range(4))
def test_every_assignment_of_models_without_links(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(15):
        units = rng.randint(2, 7)
        model = random_model(rng, units, 3 if units < 7 else 2, linked=0.0)
        _agrees(model, rng, budgets=3)
        least = smallest(model)
        assert model.peak(list(least.choice)) == least.peak_bytes


@pytest.mark.parametrize("seed", range(4))
def test_with_too_little_work_the_bound_holds(seed: int) -> None:
    rng = random.Random(seed)
    proofs = 0
    for _ in range(30):
        model = random_model(rng, 5, 2)
        peak, seconds = rng.choice(frontier(model))
        found = solve(model, peak, work_limit=rng.choice([0, 100, 1000]))
        assert found is not None
        assert found.peak_bytes <= peak
        assert found.lower_bound <= seconds <= found.seconds
        assert found.proved == (found.lower_bound == found.seconds)
        proofs += found.proved
    assert proofs < 30


_models = st.builds(
    lambda seed, units, linked: random_model(random.Random(seed), units, 4, linked),
    st.integers(0, 2**32),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.7, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(_models, st.integers(-10, 250))
def test_what_is_found_keeps_its_promises(model: StepModel, budget: int) -> None:
    least, found = smallest(model), solve(model, budget)
    assert (found is None) == (budget < least.peak_bytes)
    if found is None:
        return
    check(model, found.schedule)
    assert evaluate(model, found.schedule) == (found.peak_bytes, found.seconds)
    assert found.peak_bytes <= budget
    assert found.proved
    more = solve(model, budget + 7)
    assert more is not None
    assert more.seconds <= found.seconds


@settings(max_examples=40, deadline=None)
@given(_models, st.integers(0, 8), st.integers(0, 250), st.data())
def test_fewer_options_or_links_never_help(model: StepModel, unit: int, budget: int, data: st.DataObject) -> None:
    u = unit % len(model.units)
    pinned = data.draw(st.sampled_from(model.options[u]))
    # the default of `record_bytes` depends on the unit's other options
    pinned = replace(pinned, record_bytes=model.record_bytes(u, model.options[u].index(pinned)) if model.linked else 0)
    fewer = replace(model, options=(*model.options[:u], (pinned,), *model.options[u + 1 :]))
    unlinked = replace(model, linked=(*model.linked[:u], False, *model.linked[u + 1 :]))
    found = solve(model, budget)
    for harder in (fewer, unlinked):
        worse = solve(harder, budget)
        if worse is not None:
            assert found is not None
            assert found.seconds <= worse.seconds


def _spread(model: StepModel) -> dict[str, int]:
    """Budgets from loose to just above the smallest."""
    plain, every_block = model.peak([0] * len(model.units)), model.peak([11] * len(model.units))
    low = smallest(model).peak_bytes
    return {
        "loose": every_block + (plain - every_block) * 8 // 10,
        "medium": every_block + (plain - every_block) * 4 // 10,
        "tight": every_block + (plain - every_block) * 3 // 100,
        "every block": every_block,
        "below": low + (every_block - low) // 2,
        "deep": low + (every_block - low) // 5,
        "deeper": low + (every_block - low) // 20,
    }


@pytest.mark.parametrize(
    ("kinds", "odd_bytes", "gradient_bytes"),
    [
        ([0] * 100, 0, 0),
        ([0] * 100, 1237, 0),
        ([0] * 100, 0, 5 * MB),
        ([u % 3 for u in range(48)], 1237, 0),
        ([u // 8 for u in range(24)], 1237, MB),
    ],
)
def test_large_models_are_solved_and_proved_with_little_work(
    kinds: list[int], odd_bytes: int, gradient_bytes: int
) -> None:
    model = blocks(kinds, odd_bytes, gradient_bytes)
    before = 0.0
    for budget in _spread(model).values():
        found = solve(model, budget, work_limit=20_000_000)
        assert found is not None
        assert found.proved
        assert found.peak_bytes <= budget
        assert found.seconds >= before
        before = found.seconds
    assert any(isinstance(item, Run) for item in found.schedule)


def test_runs_reach_below_one_saved_input_per_block() -> None:
    model = blocks([0] * 32)
    flat = smallest(replace(model, linked=()))
    deep = smallest(model)
    # what is always there, all inputs, what a block keeps, and four inputs' worth in its backward
    assert flat.peak_bytes == (100 + 32 * 4 + 64 + 4 * 4) * MB + 9856
    # two inputs: the first one, and the one in use
    assert deep.peak_bytes == (100 + 2 * 4 + 64 + 4 * 4) * MB
    assert all(isinstance(item, Run) for item in deep.schedule)


def test_runs_cost_nothing_where_recomputing_does() -> None:
    """As `checkpoint_sequential`: blocks recomputed together hold one input, and run their forward once more each."""
    model = blocks([0] * 32)
    flat = smallest(replace(model, linked=()))
    with_runs = solve(model, flat.peak_bytes)
    assert with_runs is not None
    assert with_runs.seconds < flat.seconds


def test_the_same_question_has_the_same_answer() -> None:
    model = blocks([u % 2 for u in range(24)], odd_bytes=77)
    copy = replace(model, base_seconds=2.0)  # equal but for this: nothing is remembered
    for budget in _spread(model).values():
        assert solve(model, budget) == solve(copy, budget)


def test_a_choice_is_asked_of_flat_schedules_only() -> None:
    model = blocks([0] * 4)
    with pytest.raises(ValueError, match="no choice"):
        _ = smallest(model).choice
    everything = solve(model, model.peak([0] * 4))
    assert everything is not None
    assert everything.choice == (0, 0, 0, 0)
    assert everything.seconds == everything.gap == 0.0


def test_the_gap_is_a_fraction_of_the_seconds() -> None:
    assert Solution((), 2.0, 1.5, 0).gap == 0.25
    assert not Solution((), 2.0, 1.5, 0).proved


@pytest.mark.slow
def test_four_hundred_twins() -> None:
    """Alone shows a proof at the length of the largest models; odd bytes are the harder kind."""
    model = blocks([0] * 400, 1237)
    for budget in _spread(model).values():
        found = solve(model, budget)
        assert found is not None
        assert found.proved


@pytest.fixture(scope="module")
def stages() -> tuple[StepModel, int, float]:
    """Three stages of 20 blocks; a budget near the least, with nested runs of many kinds; the least seconds there."""
    model = blocks([u // 20 for u in range(60)], odd_bytes=1237)
    every_block, low = model.peak([11] * 60), smallest(model).peak_bytes
    budget = low + (every_block - low) // 5
    best = solve(model, budget)
    assert best is not None
    assert best.proved
    return model, budget, best.seconds


def test_with_less_work_than_it_takes_there_are_a_schedule_and_a_bound(stages: tuple[StepModel, int, float]) -> None:
    model, budget, best = stages
    costs, bounds = [], []
    for work_limit in (0, 6_000_000, 14_000_000):
        found = solve(model, budget, work_limit=work_limit)
        assert found is not None
        assert found.peak_bytes <= budget
        assert found.lower_bound < best
        costs.append(found.seconds / best)
        bounds.append(found.lower_bound / best)
    assert costs == sorted(costs, reverse=True)
    assert costs[1] < 1.01
    assert bounds == sorted(bounds)
    assert bounds[0] == 0.0
    assert bounds[2] > 0.7


def test_fewer_steps_per_run_bound_the_best_schedule_from_both_sides(stages: tuple[StepModel, int, float]) -> None:
    model, budget, best = stages
    solver = _Solver(chain_of(model), TopLevel(chain_of(model), budget), 16_000_000)
    solver._round(0, 10**9, final=False)
    solver._thinned(solver.best - solver.bound)
    assert 0.95 * best < solver.bound / 10**9 <= best <= solver.best / 10**9 < 1.01 * best
    assert evaluate(model, solver.schedule)[0] <= budget


def test_many_units_without_links_are_flat() -> None:
    model = replace(blocks([u % 5 for u in range(60)], odd_bytes=1237), linked=())
    plain, every_block = model.peak([0] * 60), model.peak([11] * 60)
    for tenths in (1, 3, 5, 7, 9):
        budget = every_block + (plain - every_block) * tenths // 10
        found = solve(model, budget)
        assert found is not None
        assert found.proved
        assert model.peak(list(found.choice)) == found.peak_bytes <= budget
        # one step up for any unit does not fit, or is dearer
        for u, c in itertools.product(range(60), range(12)):
            other = [*found.choice[:u], c, *found.choice[u + 1 :]]
            if model.options[u][c].seconds < model.options[u][found.choice[u]].seconds:
                assert model.peak(other) > budget
