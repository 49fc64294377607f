"""Exports: what other tools read is the timeline, to the byte, and the same every time."""

from __future__ import annotations

import base64
import csv
import dataclasses
import gzip
import importlib.util
import json
import pickle
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.cuda import _memory_viz as viz

import ullage as ul
from tests.small import tiny
from ullage.report import ENDINGS, Timeline
from ullage.report._arena import Arena
from ullage.report._chrome import _us
from ullage.report._records import CATEGORIES
from ullage.report._terminal import LETTERS, terminal

ROOFLINE: Any = {"costs": "roofline"}


@pytest.fixture(scope="module")
def planned() -> Timeline:
    """Two micro-batches, everything recomputed, a budget."""
    work = dataclasses.replace(tiny(), accumulate=2)
    plan = ul.plan(work, "100% of plain", pin={"blocks.*": "recompute"}, **ROOFLINE)
    found = ul.timeline(work, plan)
    assert (
        found.budget_bytes == plan.baseline.peak_bytes > found.peak_bytes and "inside the op" in found.live_by_category
    )
    return found


@pytest.fixture(scope="module")
def files(planned: Timeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    found = {ending: folder / f"timeline{ending}" for ending in ENDINGS}
    for path in found.values():
        planned.export(path)
    return found


def test_files_are_the_same_every_time(planned: Timeline, files: dict[str, Path], tmp_path: Path) -> None:
    planned.save(tmp_path / "saved.json")
    loaded = Timeline.load(tmp_path / "saved.json")
    for ending, path in files.items():
        for k, t in enumerate((planned, loaded)):
            t.export(tmp_path / f"{k}{ending}")
            assert (tmp_path / f"{k}{ending}").read_bytes() == path.read_bytes(), ending
    assert gzip.decompress(files[".json.gz"].read_bytes()) == files[".json"].read_bytes()


@pytest.fixture(scope="module")
def trace(files: dict[str, Path]) -> list[dict[str, Any]]:
    text = files[".json"].read_text()
    assert text.startswith('{"displayTimeUnit":"ms","traceEvents":[') and "\\u" not in text
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return events


def test_the_trace_is_what_the_format_asks_for(trace: list[dict[str, Any]]) -> None:
    """Trace Event Format, and what Perfetto's importer makes of it."""
    kinds = Counter(e["ph"] for e in trace)
    assert set(kinds) == {"M", "X", "C", "i"} and kinds["i"] == 1
    for e in trace:
        assert type(e["pid"]) is int and isinstance(e["name"], str) and e["name"]
        if e["ph"] != "M":
            assert isinstance(e["ts"], float | int) and e["ts"] >= 0 and type(e["tid"]) is int
    for e in (e for e in trace if e["ph"] == "M"):
        assert e["name"] in ("process_name", "thread_name", "thread_sort_index") and e["args"]
    for e in (e for e in trace if e["ph"] == "C"):
        assert e["args"] and all(type(v) is int for v in e["args"].values())
    assert next(e for e in trace if e["ph"] == "i")["s"] in ("g", "p", "t")


@pytest.mark.parametrize("read", [lambda us: int(us * 1e3), lambda us: round(us * 1e3)], ids=["cut off", "rounded"])
def test_slices_nest(read: Any, trace: list[dict[str, Any]]) -> None:
    """As the format asks for, in ns, however a reader gets them; and each comes after those it lies in."""
    for lane in (1, 2, 3):
        slices = [(read(e["ts"]), read(e["dur"])) for e in trace if e["ph"] == "X" and e["tid"] == lane]
        assert slices == sorted(slices, key=lambda s: s[0])
        open_until: list[int] = []
        for ts, dur in slices:
            while open_until and open_until[-1] <= ts:
                open_until.pop()
            assert not open_until or ts + dur <= open_until[-1]
            open_until.append(ts + dur)


def test_times_are_read_back_to_the_ns() -> None:
    draw = random.Random(0)
    for digits in range(1, 14):
        for ns in (draw.randrange(10**digits) for _ in range(500)):
            assert int(_us(ns) * 1e3) == round(_us(ns) * 1e3) == ns


def test_lanes(planned: Timeline, trace: list[dict[str, Any]]) -> None:
    names = {e["tid"]: e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    assert names == {1: "phases", 2: "modules", 3: "recomputed"}
    lanes = {k: [e for e in trace if e["ph"] == "X" and e["tid"] == k] for k in names}
    micro = [["micro-batch 0", "forward", "backward"], ["micro-batch 1", "forward", "backward", "optimizer"]]
    assert [e["name"] for e in lanes[1]] == ["first step", *sum(micro, []), "later step", *sum(micro, [])]
    leaves = [e for lane in (2, 3) for e in lanes[lane] if "args" in e]
    assert sorted(e["args"]["event"] for e in leaves) == list(range(len(planned)))
    for e in leaves:
        wanted = planned.event(e["args"]["event"])
        assert (e["name"], e["args"]["source"]) == (wanted.op, wanted.source)
        assert e["args"]["live_bytes"] == wanted.live_bytes and (e["tid"] == 3) == wanted.recomputed
        assert e["ts"] == pytest.approx(wanted.start_seconds * 1e6, abs=1e-3)
    outer = [e["name"] for e in lanes[3] if e["name"].startswith("blocks.") and e["name"].count(".") == 1]
    assert outer == ["blocks.1", "blocks.0"] * 4
    assert {"blocks.0.qkv", "head", "(root)", "forward", "optimizer"} <= {e["name"] for e in lanes[2]}


def test_counters(planned: Timeline, trace: list[dict[str, Any]]) -> None:
    counters = [e for e in trace if e["ph"] == "C"]
    live = [e for e in counters if e["name"] == "live bytes"]
    total = [e for e in counters if e["name"] == "live bytes, all"]
    assert [sum(e["args"].values()) for e in live] == [e["args"]["bytes"] for e in total]
    assert max(e["args"]["bytes"] for e in total) == planned.peak_bytes
    assert [e["args"] for e in counters if e["name"] == "budget"] == [{"bytes": planned.budget_bytes}]
    starts = [round(s * 1e9) for s in planned.start_seconds]
    rows = [{c: int(n[i]) for c, n in planned.live_by_category.items()} for i in range(len(planned))]
    wanted = [(s, r) for k, (s, r) in enumerate(zip(starts, rows, strict=True)) if k == 0 or r != rows[k - 1]]
    assert [(round(e["ts"] * 1e3), e["args"]) for e in live] == wanted
    mark = next(e for e in trace if e["ph"] == "i")
    assert mark["args"] == {"event": planned.peak_event, "source": planned.peak.source}
    assert round(mark["ts"] * 1e3) == starts[planned.peak_event]


def _peak(snapshot: dict[str, Any]) -> int:
    """The highest moment of a snapshot's history; no block lies in another one then."""
    alive: dict[int, int] = {}
    highest = now = 0
    for e in snapshot["device_traces"][0]:
        if e["action"] == "alloc":
            assert e["addr"] not in alive and e["size"] > 0
            alive[e["addr"]] = e["size"]
            now += e["size"]
        elif e["action"] == "free_completed":
            assert alive.pop(e["addr"]) == e["size"]
            now -= e["size"]
        if now > highest:
            highest = now
            ends = sorted((a, a + n) for a, n in alive.items())
            assert all(end <= begin for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))
    return highest


def _of(html: str) -> dict[str, Any]:
    """The snapshot in one of torch's plots, as its viewer gets it."""
    found = re.search(r'"base64": "([^"]*)"', html)
    assert found is not None
    data: dict[str, Any] = pickle.loads(base64.b64decode(found[1]))
    return data


def test_torch_reads_the_snapshot(planned: Timeline, files: dict[str, Path]) -> None:
    data = pickle.loads(files[".pickle"].read_bytes())
    assert _peak(_of(viz.trace_plot(data))) == planned.peak_bytes
    assert _peak(_of(viz.segment_plot(data))) == planned.peak_bytes
    reserved = data["segments"][0]["total_size"]
    assert planned.peak_bytes <= reserved < 1.5 * planned.peak_bytes
    assert _of(viz.trace_plot(data, plot_segments=True))["device_traces"][0][0]["size"] == reserved
    summary = viz.segsum(data)
    assert "segments: 1" in summary and f"total_reserved: {viz.Bytes(reserved)}" in summary
    end = sum(x.nbytes for x in planned.alive(-1) if x.death == len(planned))
    assert f"total_allocated: {viz.Bytes(end)}" in summary
    assert viz.trace(data).count("\n") > len(planned)
    lines = viz.memory(data, format_flamegraph=lambda text: text)
    assert _flame(lines, "active_allocated") == end and _flame(lines, "inactive") == reserved - end
    left = viz.trace_plot(pickle.loads(files[".pickle"].read_bytes()), filter_freed=True)
    kept = [e for e in _of(left)["device_traces"][0] if e["action"] == "alloc"]
    assert sum(e["size"] for e in kept) == end


def test_the_snapshot_at_the_peak(planned: Timeline, files: dict[str, Path]) -> None:
    data = pickle.loads(files[".peak.pickle"].read_bytes())
    assert _peak(data) == planned.peak_bytes
    lines = viz.memory(data, format_flamegraph=lambda text: text)
    assert _flame(lines, "active_allocated") == planned.peak_bytes
    assert f"total_allocated: {viz.Bytes(planned.peak_bytes)}" in viz.segsum(data)
    segment = data["segments"][0]
    active = [b for b in segment["blocks"] if b["state"] == "active_allocated"]
    assert segment["allocated_size"] == sum(b["size"] for b in active) == planned.peak_bytes
    assert sum(b["size"] for b in segment["blocks"]) == segment["total_size"]
    later = pickle.loads(files[".pickle"].read_bytes())["segments"]
    viz.compare(data["segments"], later, format_flamegraph=lambda text: text)
    heaviest = planned.alive()[0]
    assert f"{heaviest.op} {heaviest.nbytes}\n" in lines or heaviest.name in lines


def _flame(lines: str, state: str) -> int:
    """Bytes of a state in the text that flame graphs are made of."""
    rows = [line.rsplit(" ", 1) for line in lines.splitlines()]
    return sum(int(n) for stack, n in rows if stack.split(";")[1] == state)


def test_what_the_viewer_needs(planned: Timeline, files: dict[str, Path]) -> None:
    """MemoryViz.js: its unpickler knows protocols up to 4, and it fails on categories of which none is "unknown"."""
    raw = files[".pickle"].read_bytes()
    assert raw[:2] == b"\x80\x04"
    data = pickle.loads(raw)
    entries = data["device_traces"][0]
    assert entries[0]["action"] == "segment_alloc" and entries[0]["category"] == "unknown"
    sizes = Counter[str]()
    for e in entries[1:]:
        if e["action"] == "alloc" and e["frames"][-1]["name"] == "before the step":
            sizes[e["category"]] += e["size"]
    before = {c: int(n[0]) for c, n in planned.live_by_category.items()}
    assert sizes == {c: before[c] for c in ("parameter", "input")}
    assert {e["category"] for e in entries if "category" in e} == {"unknown", *planned.live_by_category}
    for a, b in zip(entries, entries[1:], strict=False):
        assert a["time_us"] <= b["time_us"]
        assert (b["action"] == "free_completed") == (a["action"] == "free_requested")
    frames = {f["name"]: f for e in entries for f in e["frames"]}
    assert re.fullmatch(r"demo/_gpt.py", frames["aten.embedding.default"]["filename"])
    assert frames["backward, recomputed"]["filename"] == "phase" and frames["blocks.0.qkv"]["filename"] == "module"


def test_a_library_s_workspace_is_there_all_the_time(tmp_path: Path) -> None:
    found = ul.timeline(tiny(), device="h200")
    found.export(tmp_path / "x.pickle")
    data = pickle.loads((tmp_path / "x.pickle").read_bytes())
    first = data["device_traces"][0][1]
    assert (first["action"], first["size"], first["category"]) == ("alloc", found.workspace_bytes, "library workspace")
    assert _peak(data) == found.peak_bytes > found.workspace_bytes
    blocks = [b for b in data["segments"][0]["blocks"] if b["state"] == "active_allocated"]
    assert found.workspace_bytes in [b["size"] for b in blocks]


def test_tables(planned: Timeline, files: dict[str, Path]) -> None:
    import pyarrow.parquet

    with files[".csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = pyarrow.parquet.read_table(files[".parquet"]).to_pylist()
    assert len(rows) == len(table) == len(planned)
    assert [r.keys() for r in rows] == [r.keys() for r in table]
    categories = {f"{c.replace(' ', '_')}_bytes": c for c in planned.live_by_category}
    for i, (text, typed) in enumerate(zip(rows, table, strict=True)):
        e = planned.event(i)
        assert {k: type(v)(text[k]) for k, v in typed.items()} == typed
        assert (typed["live_bytes"], typed["seconds"]) == (e.live_bytes, e.seconds)
        assert typed["live_bytes"] == sum(typed[name] for name in categories)
        assert (typed["step"], typed["phase"], typed["module"], typed["op"]) == (e.step, e.phase, e.module, e.op)
        assert (typed["micro_batch"], typed["recomputed"]) == (e.micro_batch, int(e.recomputed))
    assert max(int(r["live_bytes"]) for r in rows) == planned.peak_bytes


def test_what_can_not_be_written(planned: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "pyarrow" else find(n))
    for name, message in (
        ("x.parquet", r"x.parquet: Parquet needs pyarrow; pip install 'ullage\[parquet\]'"),
        ("x.svg", r"x.svg: an export is one of .json, .json.gz, .peak.pickle, .pickle, .csv, .parquet"),
        ("no/x.csv", "there is no folder .*no"),
    ):
        with pytest.raises(ul.ArgumentError, match=message):
            planned.export(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_plot(planned: Timeline) -> None:
    text = terminal(planned)
    assert text is not None and "\x1b" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    columns = [m[1] for line in lines if (m := re.fullmatch(r"[ 0-9.]*[│┤](.*)│", line))]
    stacks = ["".join(letters) for letters in zip(*columns, strict=True)]  # from above
    order = [LETTERS[c] for c in reversed(CATEGORIES)]
    for stack in stacks:
        seen = [order.index(c) for c in stack.replace("-", "").strip()]
        assert seen == sorted(seen)  # as stacked
    assert set(columns[0]) == {"-"} and "- budget" in text
    assert all(f"{LETTERS[c]} {c}" in text for c in planned.live_by_category)
    phases = next(line.strip() for line in lines if re.fullmatch(r" *f[fbro]*", line))
    assert len(phases) == len(stacks) and re.fullmatch("f+[br]+f+[br]+o+", phases)
    colored = terminal(planned, color=True)
    assert colored is not None
    assert [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", colored).splitlines()] == lines
    assert (
        "\x1b[38;5;208m" in colored and "\x1b[48" not in colored
    )  # activations are orange, on the terminal's own canvas


def test_the_highest_column_is_the_peak() -> None:
    found = ul.timeline(tiny(), **ROOFLINE)
    text = terminal(found)
    assert text is not None
    top = next(line for line in text.splitlines() if "┤" in line)
    assert re.search(r"[a-zA-Z]", top.partition("┤")[2])  # something reaches it
    number, unit = float(top.partition("┤")[0]), 2**20 if " in MiB" in text else 2**10
    assert number * unit == pytest.approx(found.peak_bytes, rel=0.005)


def test_an_arena_keeps_blocks_apart() -> None:
    draw, arena = random.Random(0), Arena(1000)
    used: dict[int, int] = {}
    for _ in range(3000):
        if used and draw.random() < 0.5:
            address = draw.choice(list(used))
            arena.give(address, used.pop(address))
        else:
            size = draw.randrange(1, 100)
            address = arena.take(size)
            assert all(address + size <= a or a + n <= address for a, n in used.items())
            assert address >= 1000 and address + size <= arena.end
            used[address] = size
    for address, size in used.items():
        arena.give(address, size)
    assert arena.take(arena.end - 1000) == 1000  # all of it is one piece again
