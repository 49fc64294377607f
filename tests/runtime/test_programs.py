"""Random programs: under `ullage.checkpoint` every step is bitwise the plain one, and nothing is left behind."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime.programs import Block, Op, Program, program_from, random_program
from tests.runtime.running import Leaks, Verdict, checked


@pytest.mark.parametrize("programs", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_programs(programs: int) -> None:
    """The slow one alone tries 1,000; each is judged beside the plain step and torch's own checkpoint."""
    kinds: Counter[str] = Counter()
    bad: list[tuple[int, Verdict]] = []
    selective = skipped = 0
    with Leaks() as leaks:
        for seed in range(programs):
            verdict = checked(random_program(seed), leaks)
            kinds[verdict.kind] += 1
            selective, skipped = selective + verdict.selective, skipped + verdict.skipped
            if verdict.defect:
                bad.append((seed, verdict))
    assert not bad, "\n".join(f"seed {s}: {v.kind}: {v.what}" for s, v in bad)
    assert kinds["equal"] >= 0.8 * programs, kinds
    assert kinds["unforeseen"] + kinds["refused"] <= 0.02 * programs, kinds
    assert skipped >= 0.9 * selective, (skipped, selective)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_program(data: st.DataObject) -> None:
    program = program_from(lambda n: data.draw(st.integers(0, n - 1)))
    with Leaks() as leaks:
        verdict = checked(program, leaks)
    assert not verdict.defect, f"{verdict.kind}: {verdict.what}"


def _linear(*, how: str, times: int = 1) -> Block:
    return Block((Op("linear"),), how, times=times)


# Programs that once showed a defect, each in its smallest form.
DEFECTS = {
    "a cast that was skipped stayed in the cache of autocast": Program(
        Block((Block((_linear(how="full"), Op("linear", 1)), "pointwise", returns=2, times=2),)), autocast=True, varies=2, needs_grad=0
    ),
    "an inner unit writes to its argument": Program(
        Block((Op("unary"), Block((Block((Op("in_place", n=46),), "full"), Op("unary")), "full", call=3))), needs_grad=3
    ),
    "an inner unit writes to its argument and keeps what it saves": Program(
        Block((Block((Block((Op("in_place", n=46), Op("linear")), "full"), Op("unary")), "full", call=3),))
    ),
    "a buffer that only some calls change": Program(
        Block((Block((Op("state", n=47), Op("unary")), "full"),)), backward=1, needs_grad=3
    ),
    "a buffer that is replaced, in two calls of a step": Program(
        Block((Block((Op("linear"), Op("state", n=28), Op("linear", 2)), "full", returns=2, times=2),))
    ),
    "a flag on which a counter depends": Program(
        Block((Block((Op("state", n=10), Op("linear")), "full"),)), varies=1
    ),
    "a tensor in a dict that it holds is changed after it": Program(
        Block(
            (
                Op("unary"), Op("binary", 2), Block((Op("in_place", n=5),), "full", (1,), 3, 3, 3), Op("in_place", 3, 1, 23),
                Op("in_place", 3, 2, 3), Op("binary", 1, 3, 57),
            ),
            inputs=(2, 2), passing=2, returns=1,
        ),
        varies=1, needs_grad=2, batch=1,
    ),
    "a tensor in an object is written to, then saved": Program(
        Block((Block((Op("in_place", n=21), Op("linear")), "full", passing=5),))
    ),
    "a failed backward left its frame": Program(
        Block((Block((Op("softmax"), Op("in_place", n=10), Op("unary")), "full", (3,)),))
    ),
    "an argument is also closed over, so that an inner unit has one tensor twice, in a replay two": Program(
        Block((Block((Block((Op("softmax"),), "full", (2, 3)), Op("linear")), "full", (1,), call=4),))
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", DEFECTS.values(), ids=list(DEFECTS))
def test_a_defect_stays_away(program: Program) -> None:
    with Leaks() as leaks:
        verdict = checked(program, leaks)
    assert not verdict.defect, f"{verdict.kind}: {verdict.what}"


# Programs whose selective replay once skipped nothing, though it could.
IDLE = {
    "views of one storage that are alike": Program(Block((Block((Op("linear"), Op("linear")), "all"),))),
    "a selective unit in a selective one": Program(
        Block((Block((Op("linear"), _linear(how="all"), Op("linear")), "all"),))
    ),
    "an in-place op on a view": Program(
        Block((Block((Op("in_place", n=27), Op("matmul", 2, n=11)), "all", call=4),)), needs_grad=3
    ),
    "an op that fails and is caught": Program(Block((Block((Op("apart", n=7), Op("linear")), "all"),)), needs_grad=2),
}  # fmt: skip


@pytest.mark.parametrize("program", IDLE.values(), ids=list(IDLE))
def test_a_selective_replay_skips(program: Program) -> None:
    with Leaks() as leaks:
        verdict = checked(program, leaks)
    assert verdict.kind == "equal", verdict.what
    assert verdict.selective > 0 and verdict.skipped == verdict.selective


@pytest.mark.parametrize(
    "seed", [724, 1067, 4762, 8198, 9147, 9260, 10703, 13176, 13304, 13572, 14201, 14377, 17079, 18489]
)
def test_programs_that_were_defects(seed: int) -> None:
    """In-place writes to tensors that other units see, or that change between forward and backward."""
    with Leaks() as leaks:
        verdict = checked(random_program(seed), leaks)
    assert verdict.kind in ("equal", "lenient", "refused"), f"{verdict.kind}: {verdict.what}"
