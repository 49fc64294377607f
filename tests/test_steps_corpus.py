"""The corpus of `benchmarks/steps.py` imports, names each idiom once, and judges one."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_corpus_is_large_and_of_many_kinds(corpus: None) -> None:
    from _steps import IDIOMS

    kinds = Counter(i.kind for i in IDIOMS.values())
    assert len(IDIOMS) >= 120 and min(kinds.values()) >= 5
    assert set(kinds) == {
        "batch", "factory", "models", "optimizer", "script", "modes", "first forward", "state", "values",
    }  # fmt: skip


@pytest.mark.slow  # three plans, each measured and verified
def test_an_idiom_comes_through(corpus: None) -> None:
    from _steps._judge import judged

    row = judged("a global step called step")
    assert (row["outcome"], row["error"], row["stage"]) == ("ok", 0.0, "done"), row
    assert len(row["compared"]) == 8 and row["smallest_bytes"] < row["plain_bytes"]
    assert "_steps" in sys.modules
