"""Runs against what is known to be optimal: Revolve on chains of equal units, Rotor's recurrence on any."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import pytest

from tests.planner.instances import blocks, unit_chain
from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.solver._chain import Chain
from ullage.solver._instance import OptionFacts, StepModel
from ullage.solver._runs import ALL, Effort, Frontiers, TooManyPoints, at
from ullage.solver._solve import smallest, solve


@lru_cache
def _revolve_forwards(steps: int, slots: int) -> int:
    """Forward steps of Revolve's schedule, those that record included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba is optional
        checkpoint_schedules = pytest.importorskip("checkpoint_schedules")
        schedule = checkpoint_schedules.Revolve(steps, slots)
    forwards = [a for a in schedule if isinstance(a, checkpoint_schedules.Forward)]
    return sum(a.n1 - a.n0 for a in forwards)


# A slot is a byte: of c + 2 bytes beyond the 10 that are always there, c are for inputs that are held (the first
# unit's among them), one for the input in use, and one for what a forward makes or a backward needs.


@pytest.mark.parametrize("slots", range(1, 8))
def test_the_frontier_of_a_run_is_revolves(slots: int) -> None:
    frontiers = Frontiers(Chain(unit_chain(30)), 10**6, 10**15, 10**9, ALL)
    for n in range(2, 31):
        cost = at(frontiers.steps[frontiers.chain.kind[0, n - 1]], np.array([slots + 1]))
        assert cost[0] == _revolve_forwards(n, slots) * 10**9


@pytest.mark.parametrize("slots", range(1, 8))
@pytest.mark.parametrize("last_is_kept", [False, True])
def test_a_step_is_revolves(slots: int, last_is_kept: bool) -> None:
    """The loss is Revolve's last step, which ours does not count; or the last unit is, which is recorded at once."""
    for n in (*range(2, 13), 20, 29):
        found = solve(unit_chain(n, last_is_kept), 10 + slots + 2)
        assert found is not None
        assert found.proved
        forwards = _revolve_forwards(n, slots) if last_is_kept else _revolve_forwards(n + 1, slots) - 1
        assert found.seconds == forwards - n
        assert found.peak_bytes <= 10 + slots + 2


def test_the_smallest_is_one_slot() -> None:
    found = smallest(unit_chain(30))
    assert (found.peak_bytes, found.seconds) == (10 + 1 + 2, 30 * 31 // 2)


@dataclass(frozen=True)
class _Stage:
    """Rotor's facts of a stage: bytes of its output, of that output's gradient, of passing; seconds; its options."""

    output: int
    gradient: int
    passing: int
    forward: int
    options: tuple[tuple[int, int, int, int], ...]  # saved (the output included), in forward, in backward, its seconds


def _rotor(stages: list[_Stage], first_input: int, budget: int) -> float:
    """Least seconds of forward and backward (research notes 4.1 and 4.2); the loss is the stage after the last."""
    loss = _Stage(0, 0, 0, 0, ((0, 0, 3, 0),))
    chain = [_Stage(first_input, 0, 0, 0, ()), *stages, loss]

    @cache
    def cost(s: int, t: int, m: int) -> float:
        stage, best = chain[s], float("inf")
        for saved, forward, backward, seconds in stage.options:
            recording = chain[t].gradient + saved + forward
            reversing = stage.gradient + saved + chain[s - 1].gradient + backward
            if m >= max(recording, reversing):
                rest = 0.0 if s == t else cost(s + 1, t, m - saved)
                best = min(best, stage.forward + seconds + rest)
        passing, run = chain[t].gradient + stage.output + stage.passing, 0
        for last in range(s, t):  # s..last hold the input of s only
            if last > s:
                moved = chain[last - 1].output + chain[last].output + chain[last].passing
                passing = max(passing, chain[t].gradient + moved)
            run += chain[last].forward
            if m >= passing:
                rest = cost(last + 1, t, m - chain[last].output)
                best = min(best, run + rest + cost(s, last, m))
        return best

    return cost(1, len(stages) + 1, budget - first_input)


def _as_model(stages: list[_Stage], first_input: int) -> StepModel:
    """The same chain for our solver; an option that saves may also be how a stage that held its input is replayed."""
    inputs = [first_input, *(s.output for s in stages)]
    gradients = [0, *(s.gradient for s in stages)]
    facts, forward_bases, bases = [], [], []
    alive = 0
    for u, stage in enumerate(stages):
        alive += inputs[u]
        reference = min(seconds for *_, seconds in stage.options)
        rows = []
        for saved, forward, backward, seconds in stage.options:
            reversing = alive + gradients[u + 1] + saved + gradients[u] + backward
            recording = saved + forward
            extra = float(seconds - reference)
            keep = KEEP if not rows else Option("select", str(len(rows)))
            rows.append(OptionFacts(keep, saved - stage.output, max(alive + recording, reversing), extra, recording))
            replay = max(alive + gradients[u + 1] + recording, reversing)
            rows.append(OptionFacts(RECOMPUTE, 0, replay, stage.forward + extra))
        facts.append(tuple(rows))
        forward_bases.append(alive)
        bases.append(alive + gradients[u + 1])
    alive += inputs[-1]
    return StepModel(
        tuple(str(u) for u in range(len(stages))),
        tuple(facts),
        (0, *(0,) * (len(stages) - 1), alive + gradients[-1] + 3),
        1.0,
        linked=(False, *(True,) * (len(stages) - 1)),
        link_bytes=(0, *inputs[1:-1]),
        forward_seconds=tuple(float(s.forward) for s in stages),
        forward_peak_bytes=tuple(s.output + s.passing for s in stages),
        backward_base_bytes=tuple(bases),
        forward_base_bytes=tuple(forward_bases),
    )


def _random_stage(rng: random.Random) -> _Stage:
    output = rng.randint(0, 8)
    options = tuple(
        (output + rng.randint(0, 12), rng.randint(0, 4), rng.randint(0, 4), rng.randint(1, 6))
        for _ in range(rng.randint(1, 3))
    )
    return _Stage(output, rng.randint(0, 6), rng.randint(0, 5), rng.randint(0, 5), options)


def test_rotors_recurrence_with_options_is_met_exactly() -> None:
    rng = random.Random(0)
    compared = 0
    for _ in range(150):
        stages, first_input = [_random_stage(rng) for _ in range(rng.randint(2, 6))], rng.randint(1, 5)
        model = _as_model(stages, first_input)
        once = sum(s.forward + min(seconds for *_, seconds in s.options) for s in stages)
        low = smallest(model).peak_bytes
        assert _rotor(stages, first_input, low - 1) == float("inf")
        for budget in (low, low + rng.randint(1, 6), low + rng.randint(7, 20)):
            found = solve(model, budget)
            assert found is not None
            assert found.seconds + once == _rotor(stages, first_input, budget)
            compared += 1
    assert compared == 450


def test_twins_share_their_frontiers() -> None:
    # one kind per length, and as many for runs from the first block, which differs
    assert Chain(blocks([0] * 50)).kinds == 50 + 49
    assert Chain(blocks([0, 1] * 25)).kinds == 50 + 49 + 48


def test_frontiers_are_bounds_of_what_is_left_out() -> None:
    chain = Chain(blocks([0] * 12))
    budget = 700 * 2**20
    full = Frontiers(chain, budget, 10**15, 10**9, ALL)
    fewer = Frontiers(chain, budget, 10**15, 10**9, Effort(keep=5))
    lower = Frontiers(chain, budget, 10**15, 10**9, Effort(keep=5, optimistic=True))
    short = Frontiers(chain, budget, 10**15, 10**9, Effort(longest=4))
    capped = Frontiers(chain, budget, 10**7, 10**9, ALL)
    for kind, steps in enumerate(full.steps):
        cost = steps[1]
        assert (at(lower.steps[kind], steps[0]) <= cost).all()
        assert (at(fewer.steps[kind], steps[0]) >= cost).all()
        assert (at(short.steps[kind], steps[0]) >= cost).all()
        assert (at(capped.lower(kind), steps[0]) <= cost).all()
        assert len(fewer.steps[kind][0]) <= 6
        assert len(lower.steps[kind][0]) <= 5
        cheap = cost <= chain.least[kind] + 10**7
        assert (at(capped.steps[kind], steps[0])[cheap] == cost[cheap]).all()
    assert max(len(s[0]) for s in full.steps) > 100
    with pytest.raises(TooManyPoints):
        Frontiers(chain, budget, 10**15, 1000, ALL)
