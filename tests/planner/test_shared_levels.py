"""Equal units show their levels for each other, in one step: the same model as with a step per level."""

from __future__ import annotations

import pytest

import ullage as ul
from tests.small import next_byte
from tests.zoo import adamw, text_ids
from ullage.demo import GPT
from ullage.mechanisms import select
from ullage.planner.model._model import model_of
from ullage.planner.study._prepare import study
from ullage.planner.study._study import Study


def studied(layers: int) -> Study:
    work = ul.Workload(GPT(layers=layers, width=16, heads=2, seq=16), text_ids(2, 16), loss=next_byte, optimizer=adamw)
    s = study(work, None, "roofline")
    model_of(s)
    return s


def test_one_step_shows_all_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units at the ends have other neighbours than the one that stands for them; their numbers are the same here to the byte."""
    shared = studied(27)
    levels = [o for o in shared.options[shared.units[0].fqn] if o.level and o.level != "matmul_attention"]
    assert "levels" in shared.captures and not any(n.startswith("level ") for n in shared.captures)
    assert 2 <= len(levels) <= 9 and set(shared.captures["levels"].assignment.values()) == set(levels)
    monkeypatch.setattr(select, "EQUAL_PER_LEVEL", 100)
    single = studied(27)
    assert len(single.captures) == len(shared.captures) + len(levels) - 1
    assert model_of(shared) == model_of(single)


def test_few_equal_units_run_each_level_in_a_step_of_its_own() -> None:
    s = studied(3)
    assert "levels" not in s.captures and "level 0" in s.captures and not s.explored.shown
