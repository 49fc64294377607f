"""`ullage timeline`, `check` and `compare`: what they print, write and refuse, and their exit codes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import ullage as ul
from ullage.report import Timeline
from ullage_cli._main import run

ROOT = Path(__file__).parents[2]
FACTORY = f"{ROOT}/tests/small.py:blocks"
FAST = ["--costs", "roofline"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


def test_timeline(capsys: Any) -> None:
    exports = ["--export", "x.json.gz", "--export", "x.pickle", "--export", "x.csv"]
    assert run(["timeline", FACTORY, *FAST, "-o", "timeline.json", *exports]) == 0
    said = capsys.readouterr().out
    found = Timeline.load("timeline.json")
    assert said.startswith(str(found)) and "live bytes in KiB, later step" in said and "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert said.endswith("".join(f"written to {p}\n" for p in ("timeline.json", "x.json.gz", "x.pickle", "x.csv")))
    assert sorted(p.name for p in Path().iterdir()) == ["timeline.json", "x.csv", "x.json.gz", "x.pickle"]
    assert run(["timeline", FACTORY, *FAST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("timeline.json").read_text())


def test_the_timeline_of_a_plan(capsys: Any) -> None:
    assert run(["plan", FACTORY, "--policy", "every_block", "-o", "plan.json", *FAST]) == 0
    assert run(["timeline", FACTORY, "--plan", "plan.json", "-o", "timeline.json"]) == 0
    said, found = capsys.readouterr().out, Timeline.load("timeline.json")
    assert "timeline of the plan (every_block) on cpu" in said and "r recomputed" in said
    assert found.peak_bytes == ul.Plan.load("plan.json").predicted.peak_bytes


def test_without_the_extras(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("pyarrow", "plotext") else find(n))
    assert run(["timeline", FACTORY, *FAST]) == 0
    assert capsys.readouterr().out.endswith("needs plotext; pip install 'ullage[plot]'\n")
    assert run(["timeline", FACTORY, "--export", "x.parquet"]) == 2
    assert capsys.readouterr().err == "error: x.parquet: Parquet needs pyarrow; pip install 'ullage[parquet]'\n"


def test_check(capsys: Any) -> None:
    against = ["--against", "base.json", *FAST]
    assert run(["check", FACTORY, *against, "--update", "--max-peak", "1MiB"]) == 0
    assert capsys.readouterr().out.endswith("written to base.json\n")
    base = ul.Baseline.load("base.json")
    assert run(["check", FACTORY, *against, "--max-peak", "1MiB"]) == 0
    assert "check ok: " in capsys.readouterr().out
    Path("grown.py").write_text("from tests.small import blocks\n\ndef f():\n    return blocks(layers=4)\n")
    assert run(["check", "grown.py:f", *against]) == 1
    said = capsys.readouterr().out
    assert said.startswith("check FAILED: ") and "blocks.3: new, Sequential, saves 33.00 KiB" in said
    assert run(["check", "grown.py:f", *against, "--allow-growth", "1MiB"]) == 0
    assert run(["check", "grown.py:f", *against, "--update", "--max-peak", "1000"]) == 1
    assert ul.Baseline.load("base.json") == base  # what fails is not accepted
    capsys.readouterr()
    assert run(["check", "grown.py:f", *against, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and sum(r["values"][1] - r["values"][0] for r in found["by_module"]) > 0
    assert run(["check", FACTORY, *FAST, "--budget", "80% of plain", "--max-slowdown", "9"]) == 0
    assert run(["check", FACTORY, *FAST, "--budget", "1KiB"]) == 1
    assert "FAILED: budget 1.00 KiB: the smallest peak" in capsys.readouterr().out


def test_compare(capsys: Any) -> None:
    for policy in ("none", "every_block"):
        assert run(["plan", FACTORY, "--policy", policy, "-o", f"{policy}.json", *FAST]) == 0
    capsys.readouterr()
    assert run(["compare", "none.json", "every_block.json"]) == 0
    said = capsys.readouterr().out
    assert said == f"{ul.compare('none.json', 'every_block.json')}\n" and "A keep; B recompute" in said
    assert run(["compare", "none.json", "every_block.json", "none.json", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sides"]) == 3


BAD: dict[str, tuple[list[str], str, str]] = {
    "ending": (["timeline", FACTORY, "--export", "x.html"], "ArgumentError", "an export is one of .json, .json.gz"),
    "folder": (["timeline", FACTORY, "-o", "no/x.json"], "ArgumentError", "there is no folder no"),
    "export's folder": (["timeline", FACTORY, "--export", "no/x.csv"], "ArgumentError", "there is no folder no"),
    "nothing to check": (["check", FACTORY], "UsageError", "nothing to check: give --max-peak"),
    "no baseline": (["check", FACTORY, "--against", "none.json"], "PlanError", "write it with `ullage check --update`"),
    "no name": (["check", FACTORY, "--update", "--max-peak", "1MiB"], "UsageError", "name the file with --against"),
    "baseline's folder": (["check", FACTORY, "--update", "--against", "no/x.json"], "ArgumentError", "no folder no"),
    "nothing to compare": (["compare"], "UsageError", "Missing argument 'A B [C ...]'"),
    "not a file": (["compare", "none.json", "none.json"], "PlanError", "none.json: can't be read"),
    "no plan": (["timeline", FACTORY, "--plan", "none.json"], "PlanError", "none.json: can't be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_line(name: str, tmp_path: Path, capsys: Any) -> None:
    arguments, kind, message = BAD[name]
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("error: ") and message in said.err and not said.out
    assert run([*arguments, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == kind and message in error["message"]
    assert not list(tmp_path.iterdir())
