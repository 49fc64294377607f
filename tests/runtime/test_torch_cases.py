"""What PyTorch's own tests of checkpointing check holds for `ullage.checkpoint`, or the documents say where it differs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.runtime.torch_cases import CASES, judge, ours, torchs

DOCS = Path(__file__).parents[2] / "docs" / "runtime.md"
# other values on purpose: there a warning is right
WARNS = {"unchecked_shapes", "what_is_saved_may_be_written_to", "generators_that_are_not_preserved"}
NEWEST = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's debug mode logs what is no format string, at which pytest's own handler raises
    monkeypatch.setattr(logging.getLogger("LoggingTensor"), "propagate", False)
    one = CASES[name]
    theirs, found = judge(one, torchs), judge(one, ours)
    if NEWEST:
        assert theirs.how == "passes", theirs.why
    if theirs.how == "skipped":
        pytest.skip(theirs.why)
    assert found.how == ("fails" if one.row else "passes"), found.why
    assert bool(found.warned) == (name in WARNS), found.warned


def test_each_difference_has_its_row() -> None:
    rows = [line.split(" | ")[0].removeprefix("| ") for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    named = {one.row for one in CASES.values() if one.row}
    assert len(named) == 6 and named <= set(rows), named - set(rows)


def test_most_of_them_are_pytorchs() -> None:
    of = {one.of for one in CASES.values() if one.of}
    assert len(CASES) >= 110 and len(of) >= 40
