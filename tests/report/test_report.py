"""What a report says is what the plan, its timeline and the measurement say; how much of it is drawn; `ullage report`."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import ullage as ul
from tests.report import pages
from tests.small import blocks, tiny
from ullage._bytes import format_bytes
from ullage.report._drawn import drawn_overview, drawn_timeline
from ullage.report._thin import kept_events
from ullage.report._tree import tree
from ullage_cli._main import run

ROOT = Path(__file__).parents[2]
FACTORY = f"{ROOT}/tests/small.py:blocks"
FAST = ["--costs", "roofline"]
ROOFLINE: Any = {"costs": "roofline"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow
def test_a_budget_is_that_of_plan() -> None:
    """Alone compares a report's plan, timelines and frontier with those asked for one by one."""
    work = tiny()
    plan = ul.plan(work, "80% of plain", **ROOFLINE)
    found = ul.report(work, budget="80% of plain", points=2, **ROOFLINE)
    assert (
        found.plan == plan and found.planned == ul.timeline(work, plan) and found.plain == ul.timeline(work, **ROOFLINE)
    )
    assert found.slowdown == found.planned.step_seconds / found.plain.step_seconds - 1 > 0
    frontier = ul.frontier(work, 2, **ROOFLINE)
    assert found.frontier is not None and found.frontier.policies == frontier.policies
    facts = [[(p.peak_bytes, p.step_seconds) for p in f.points] for f in (frontier, found.frontier)]
    assert facts[0] == facts[1]
    assert format_bytes(plan.predicted.peak_bytes) in str(found) and found.title == "GPT"


@pytest.mark.slow
def test_a_plan_from_a_file_is_restated() -> None:
    """Alone shows a report of a plan that was edited by hand."""
    work = tiny()
    plan = ul.plan(work, "70% of plain", **ROOFLINE)
    found = ul.report(work, plan, points=None)
    assert found.frontier is None and found.notes == plan.notes
    assert found.plan.decisions == plan.decisions and found.plan.predicted == plan.predicted
    edits = [msgspec.structs.replace(plan.decisions[0], action="recompute", reason="mine"), *plan.decisions[1:]]
    edited = msgspec.structs.replace(plan, decisions=edits)
    now = ul.report(work, edited, points=None)
    assert now.plan.decisions[0].reason == "mine" and now.plan.decisions[0].bytes_freed > plan.decisions[0].bytes_freed
    assert now.plan.predicted.peak_bytes == now.judged.peak_bytes < plan.predicted.peak_bytes
    assert "edited by hand" in now.notes[0]
    pinned = ul.plan(work, policy="none", pin={"blocks.0": "recompute"}, **ROOFLINE)
    said = [ul.report(work, pinned, points=None).plan.decisions, pinned.decisions]
    facts = [[(d.unit, d.action, d.seconds_added, d.reason) for d in decisions] for decisions in said]
    assert facts[0] == facts[1] and 0 < said[0][0].bytes_freed <= said[1][0].bytes_freed  # the file's is an estimate


def test_the_plain_step() -> None:
    found = ul.report(blocks(), points=None, **ROOFLINE)
    assert found.planned is None and found.judged is found.plain and found.slowdown == 0
    assert {d.action for d in found.plan.decisions} == {"keep"} and list(drawn_overview(found)["views"]) == ["plain"]
    assert "against" not in str(found)


def test_measurements() -> None:
    work = blocks()
    plan = ul.plan(work, policy="every_block", **ROOFLINE)
    planned, plain = ul.measure(work, plan, 2), ul.measure(work, None, 2)
    assert (planned.plan_digest, plain.plan_digest) == (plan.digest, "")
    assert len(plain.step_times) == 2 and sum(plain.step_times) / 2 == pytest.approx(plain.step_seconds)
    Path("m.json").write_bytes(msgspec.json.encode(planned))
    found = ul.report(work, plan, measured=["m.json", plain], points=None)
    assert [(m.name, m.planned) for m in found.measured] == [("m.json", True), ("measurement 2", False)]
    assert not found.notes
    before = {k: v for k, v in msgspec.to_builtins(plain).items() if k not in ("step_times", "plan_digest")}
    Path("old.json").write_text(json.dumps(before))
    old = ul.report(work, plan, measured="old.json", points=None)
    assert old.notes == ["old.json does not say which step was measured; taken as one under the plan"]
    other = ul.report(work, budget="99% of plain", measured=planned, points=None, **ROOFLINE)
    assert "under another plan than this one" in other.notes[0] and other.measured[0].planned


def test_bad_arguments() -> None:
    work = blocks()
    plan = ul.plan(work, policy="every_block", **ROOFLINE)
    with pytest.raises(ul.ArgumentError, match="give one of them"):
        ul.report(work, plan, budget="1GiB")
    with pytest.raises(ul.ArgumentError, match="points=1"):
        ul.report(work, points=1)
    with pytest.raises(ul.ArgumentError, match="was measured under a plan; give the plan too"):
        ul.report(work, measured=ul.measure(work, plan, 1), points=None)
    bad: Any = plan
    with pytest.raises(ul.ArgumentError, match="measurement is a Plan; expected a"):
        ul.report(work, measured=[bad], points=None)
    with pytest.raises(ul.BudgetInfeasible):
        ul.report(work, budget="1KiB", points=None, **ROOFLINE)


@pytest.mark.parametrize("micro", [1, 3])
def test_thinning_keeps_the_exact_peaks(micro: int) -> None:
    found = pages.timeline(layers=8, events=20_000, micro=micro)
    drawn = drawn_timeline(found, parts=50)
    for name, some in found.steps.items():
        kept = kept_events(found, name, 50)
        assert len(kept) <= 103 and (np.diff(kept) > 0).all() and {some.start, some.stop - 1} <= set(kept)
        live, at = found.live_bytes[some], kept - some.start
        for k in range(50):  # of equally many ops
            edges = slice(k * len(live) // 50, (k + 1) * len(live) // 50)
            assert live[edges].max() == max(live[i] for i in at if edges.start <= i < edges.stop)
        step = drawn["steps"][name]
        totals = [sum(n) for n in zip(*step["live"].values(), strict=True)]
        assert totals == found.live_bytes[kept].tolist() and totals[step["peak"]] == live.max()
        for i, event in enumerate(map(found.event, kept)):
            names = [drawn[f][step[g][i]] for f, g in (("modules", "module"), ("ops", "op"), ("sources", "source"))]
            assert names == [event.module, event.op, event.source]
            assert {c: n[i] for c, n in step["live"].items() if n[i]} == event.by_category
            assert (drawn["phases"][step["phase"][i]], step["micro"][i]) == (event.phase, event.micro_batch)
    assert drawn["peak"] == found.peak_bytes


def test_a_short_step_is_drawn_whole() -> None:
    found = ul.timeline(blocks(), **ROOFLINE)
    assert kept_events(found, "later").tolist() == list(range(found.first_events, len(found)))


def test_the_tree_adds_up() -> None:
    for found in (ul.timeline(tiny(), **ROOFLINE), pages.timeline(layers=4, events=2000)):
        for event in (None, 0, len(found) - 1):
            nodes = tree(found, event)
            sums: dict[str, int] = {}
            for node in nodes[1:]:
                assert node.parent is not None
                sums[node.parent] = sums.get(node.parent, 0) + node.nbytes
            assert len({n.key for n in nodes}) == len(nodes)
            assert all(sums[n.key] == n.nbytes for n in nodes if not n.category)
            at = found.peak_event if event is None else event
            assert nodes[0].nbytes == found.event(at).live_bytes
            places = {n.key: k for k, n in enumerate(nodes)}
            assert all(places[n.parent] < places[n.key] for n in nodes if n.parent is not None)


def test_the_command(capsys: Any) -> None:
    pytest.importorskip("plotly")
    assert run(["report", FACTORY, "--budget", "99% of plain", "--points", "2", "-o", "r.html", *FAST]) == 0
    said = capsys.readouterr().out
    assert said.startswith("report on small.py:blocks, cpu (costs: roofline)") and said.endswith("written to r.html\n")
    text = Path("r.html").read_text()
    assert 'id="frontier"' in text and str(ROOT) not in text
    assert run(["report", FACTORY, "--budget", "99% of plain", "--points", "2", "-o", "s.html", *FAST]) == 0
    assert Path("s.html").read_text() == text  # the same every time
    capsys.readouterr()
    assert run(["report", FACTORY, "--no-frontier", "--json", *FAST]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=ul.StepReport)
    assert found.frontier is None and found.plain == ul.timeline(ul.Workload.from_factory(blocks), **ROOFLINE)
    assert run(["plan", FACTORY, "--policy", "every_block", "-o", "plan.json", *FAST]) == 0
    assert run(["measure", FACTORY, "--plan", "plan.json", "--json"]) == 0
    Path("m.json").write_text(capsys.readouterr().out.partition("written to plan.json\n")[2])
    assert run(["report", FACTORY, "--plan", "plan.json", "--measured", "m.json", "--no-frontier", "-o", "r.html"]) == 0
    assert "measured (m.json): peak " in capsys.readouterr().out
    assert 'id="times"' in Path("r.html").read_text() and 'id="frontier"' not in Path("r.html").read_text()


def test_a_comparison_is_written(capsys: Any) -> None:
    pytest.importorskip("plotly")
    for policy in ("none", "every_block"):
        assert run(["plan", FACTORY, "--policy", policy, "-o", f"{policy}.json", *FAST]) == 0
    capsys.readouterr()
    assert run(["compare", "none.json", "every_block.json", "-o", "c.html"]) == 0
    assert capsys.readouterr().out == f"{ul.compare('none.json', 'every_block.json')}\nwritten to c.html\n"
    assert "Units that differ" in Path("c.html").read_text()


def test_plan_and_profile_draw(capsys: Any) -> None:
    pytest.importorskip("plotext")
    for arguments, policy in (
        (["profile", FACTORY], None),
        (["plan", FACTORY, "--policy", "every_block"], "every_block"),
    ):
        assert run([*arguments, *FAST]) == 0
        said = capsys.readouterr().out
        plot = said[said.index("\n\n") :].strip("\n").splitlines()
        assert len(plot) <= 20 and max(map(len, plot)) <= 80 and "\x1b" not in said
        assert re.fullmatch(r" *live bytes in KiB, (first|later) step; peak [0-9.]+ KiB", plot[0])
        assert "  below the axis: f forward  b backward  o optimizer  r recomputed" in plot[-1]
        assert any("R recomputed" in line for line in plot) == (policy is not None)
        assert run([*arguments, *FAST, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


BAD: dict[str, tuple[list[str], int, str]] = {
    "no file": (["report", FACTORY], 2, "name the file with -o"),
    "ending": (["report", FACTORY, "-o", "r.pdf"], 2, "r.pdf: a report is an .html file"),
    "folder": (["report", FACTORY, "-o", "no/r.html"], 2, "there is no folder no"),
    "both": (["report", FACTORY, "--plan", "p.json", "--budget", "1GiB", "-o", "r.html"], 2, "p.json: can't be read"),
    "budget": (["report", FACTORY, "--budget", "6", "-o", "r.html", *FAST], 3, "the smallest peak any plan reaches"),
    "measured": (["report", FACTORY, "--measured", "m.json", "-o", "r.html"], 2, "m.json: can't be read"),
    "points": (["report", FACTORY, "--points", "1", "-o", "r.html"], 2, "x>=2"),
    "compare": (["compare", "a.json", "b.json", "-o", "c.txt"], 2, "c.txt: a report is an .html file"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_line_and_leave_nothing(name: str, tmp_path: Path, capsys: Any) -> None:
    arguments, code, message = BAD[name]
    assert run(arguments) == code
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("error: ") and message in said.err and not said.out
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_the_page_that_was_there(capsys: Any) -> None:
    Path("r.html").write_text("mine")
    assert run(["report", FACTORY, "--budget", "1KiB", "-o", "r.html", *FAST]) == 3
    assert Path("r.html").read_text() == "mine" and [p.name for p in Path().iterdir()] == ["r.html"]


def test_without_the_extra(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("plotly", "jinja2") else find(n))
    assert run(["report", FACTORY, "-o", "r.html"]) == 2
    wanted = "error: r.html: an HTML report needs plotly and jinja2; pip install 'ullage[report]'\n"
    assert capsys.readouterr().err == wanted
    assert run(["compare", "a.json", "b.json", "-o", "r.html"]) == 2
    assert capsys.readouterr().err == wanted
