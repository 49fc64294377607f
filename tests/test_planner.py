"""The solver against brute force; plans as data; bad input."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ullage as ul
from tests.zoo import workload
from ullage.cost import devices
from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.planner.model._model import OptionFacts, StepModel
from ullage.planner.study._device import choose_device
from ullage.solver._solve import smallest, solve

_ACTIONS = [KEEP, RECOMPUTE, Option("select", "attention")]
_size = st.integers(0, 40)
_facts = st.tuples(_size, _size, st.integers(0, 9))


@st.composite
def models(draw: st.DrawFn) -> StepModel:
    n = draw(st.integers(1, 5))
    units = tuple(f"u{i}" for i in range(n))
    options = []
    for _ in units:
        rows = draw(st.lists(_facts, min_size=1, max_size=3))
        options.append(tuple(OptionFacts(_ACTIONS[i], h, p, s / 8) for i, (h, p, s) in enumerate(rows)))
    outside = tuple(draw(st.lists(_size, min_size=n + 1, max_size=n + 1)))
    return StepModel(units, tuple(options), outside, 1.0)


@settings(max_examples=300, deadline=None)
@given(models(), st.integers(0, 150))
def test_solver_equals_brute_force(model: StepModel, budget: int) -> None:
    every = list(itertools.product(*(range(len(o)) for o in model.options)))
    cost = {c: sum(model.options[u][i].seconds for u, i in enumerate(c)) for c in every}
    fits = [c for c in every if model.peak(list(c)) <= budget]
    found = solve(model, budget)
    if not fits:
        assert found is None
    else:
        assert found is not None and found.peak_bytes <= budget
        assert found.seconds == min(cost[c] for c in fits) == found.lower_bound
    assert smallest(model).peak_bytes == min(model.peak(list(c)) for c in every)


def test_plan_file_round_trip(tmp_path: Path) -> None:
    plan = ul.plan(workload("gpt"), policy="selective", costs="roofline")
    path = tmp_path / "plan.json"
    plan.save(path)
    assert ul.Plan.load(path) == plan and ul.Plan.load(path).digest == plan.digest


_DIGEST = """
import sys
import ullage as ul
from tests.zoo import workload
given = {"profile": ul.Profile.load(sys.argv[1])} if len(sys.argv) > 1 else {"costs": "roofline"}
print(ul.plan(workload("gpt"), "75% of plain", **given).digest)
"""


def _digests(*arguments: str) -> set[str]:
    found = set()
    for seed, threads in (("0", "1"), ("77", "2")):  # each process starts with cold caches
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", _DIGEST, *arguments]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found.add(run.stdout.strip())
    return found


@pytest.mark.slow
def test_the_same_workload_gives_the_same_plan_without_timing() -> None:
    """Alone compares plans of processes with other hash seeds and threads."""
    assert len(_digests()) == 1


@pytest.mark.slow
def test_the_same_profile_gives_the_same_plan(tmp_path: Path) -> None:
    """Alone shows the same for a profile with measured times that is read from a file."""
    path = tmp_path / "profile.json"
    work = workload("gpt")
    profile = ul.profile(work)
    assert profile.costs == "measured"
    profile.save(path)
    assert _digests(str(path)) == {ul.plan(work, "75% of plain", profile=profile).digest}


def test_good_budgets() -> None:
    assert ul.parse_budget("6GiB").bytes == 6 * 2**30
    assert ul.parse_budget("6 GB").bytes == 6 * 10**9
    assert ul.parse_budget(7).bytes == 7
    assert ul.parse_budget("60% of plain").resolve(1000, None) == 600
    assert ul.parse_budget("90% of device").resolve(1000, 2000) == 1800


@pytest.mark.parametrize("name", sorted(devices()))
def test_a_share_of_a_device_leaves_its_context_out(name: str) -> None:
    """On an H200 the context takes 600 MB, so all that tensors can have is 149.4 GB of its 150."""
    facts, choice = devices()[name], choose_device(workload("gpt"), name)
    assert choice.memory_bytes == facts.memory_bytes - facts.context_bytes
    assert (facts.context_bytes > 0) == (facts.kind == "cuda")
    if name == "h200":
        assert ul.parse_budget("100% of device").resolve(0, choice.memory_bytes) == 149_400_000_000


def test_a_step_function_is_captured_with_its_closure() -> None:
    model = workload("gpt").model
    optimizer = torch.optim.AdamW(model.parameters())

    def step(m: torch.nn.Module, ids: torch.Tensor) -> None:
        m(ids).float().logsumexp(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    work = ul.Workload(model, workload("gpt").batch, step=step)
    profile = ul.profile(work, costs="roofline")
    assert not optimizer.state
    measured = ul.measure(work, steps=1)
    assert not optimizer.state
    assert abs(profile.peak_bytes / measured.peak_bytes - 1) < 0.01
    assert ul.verify(work, ul.plan(work, policy="every_block", profile=profile)).ok
