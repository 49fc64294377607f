"""A run's file: what is written is what is read, what is there stays, and what is broken is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch import nn

import ullage as ul
from tests.monitor.running import Clock, monitor, steps
from ullage.monitor import StepRecord
from ullage.monitor._jsonl import read_run


def written(path: Path, times: list[float], **given: Any) -> ul.Monitor:
    clock = Clock()
    with monitor(clock, jsonl=path, **given) as m:
        steps(m, clock, times, samples=2)
    return m


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    m = written(path, [0.5, 0.25, 1.0], warmup=1, first_step=10)
    header, records = read_run(path)
    assert header == m.header and [r.step for r in records] == [10, 11, 12]
    assert records[1:] == list(m._tally.ring)
    assert ul.MonitorSummary.load(path) == m.summary()
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line) for line in lines)
    first = json.loads(lines[0])
    assert first["monitor_schema"] == 1 and first["ullage"] == ul.__version__ and first["device"] == "cpu"
    assert set(json.loads(lines[3])) == {
        "step", "time", "step_time_s", "wait_s", "samples", "samples_per_sec", "rss_bytes", "max_rss_bytes", "recomputed_units",
        "skipped_ops", "stale_logs", "recomputed_ops", "recomputed_bytes", "replay_mismatches",
    }  # fmt: skip


def test_every_field_survives() -> None:
    kinds = {"step": 3, "time": 1.5, "failed": "E", "not_available": {"a": "b"}}
    values: dict[str, Any] = {
        f: kinds.get(f, True if f in ("warmup", "counted", "nonfinite_loss") else 2)
        for f in StepRecord.__struct_fields__
    }
    record = msgspec.convert(values, StepRecord)
    assert msgspec.json.decode(msgspec.json.encode(record), type=StepRecord) == record
    assert all(getattr(record, f) == v for f, v in values.items())


def test_a_file_that_is_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("mine")
    with pytest.raises(ul.ArgumentError, match="run.jsonl: is there already; .* exists='overwrite' or 'append'"):
        written(path, [])
    with pytest.raises(ul.ArgumentError, match="run.jsonl: is no file of a Monitor to append to"):
        written(path, [], exists="append")
    with pytest.raises(ul.ArgumentError, match="exists='maybe': expected one of 'refuse', 'overwrite', 'append'"):
        written(path, [], exists="maybe")
    with pytest.raises(ul.ArgumentError, match="window=0"):
        written(path, [], exists="overwrite", window=0)
    assert path.read_text() == "mine"
    for bad, message in ((tmp_path / "none" / "x", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(ul.ArgumentError, match=message):
            written(bad, [])


def test_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written(path, [0.5] * 9)
    m = written(path, [0.25], exists="overwrite")
    assert ul.MonitorSummary.load(path) == m.summary()


def test_append_after_a_run_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written(path, [0.5, 0.5])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step":2,"tim')
    assert ul.MonitorSummary.load(path).steps == 2  # an unfinished line is left out
    written(path, [0.25, 0.25, 0.25], exists="append", first_step=2)
    assert path.read_bytes().startswith(whole)
    header, records = read_run(path)
    assert [r.step for r in records] == [0, 1, 2, 3, 4]
    s = ul.MonitorSummary.load(path)
    assert (s.steps, s.step_seconds) == (5, 0.25)
    for there in (b"", None):  # an empty file, and none
        fresh = tmp_path / f"fresh{there is None}"
        if there is not None:
            fresh.write_bytes(there)
        written(fresh, [1.0], exists="append")
        assert ul.MonitorSummary.load(fresh).steps == 1


def test_lines_are_there_within_a_second_and_at_once_after_an_error(tmp_path: Path) -> None:
    path, clock = tmp_path / "run.jsonl", Clock()
    m = monitor(clock, jsonl=path)

    def there() -> int:
        return len(path.read_text().splitlines()) - 1

    steps(m, clock, [0.25])
    assert there() == 0
    steps(m, clock, [0.25, 0.5])
    assert there() == 3
    steps(m, clock, [0.25])
    with pytest.raises(ValueError), m.step():
        raise ValueError
    assert there() == 5 and json.loads(path.read_text().splitlines()[-1])["failed"] == "ValueError"


def test_a_script_that_does_not_close_its_monitor(tmp_path: Path) -> None:
    script = "import torch, ullage as ul\nm = ul.Monitor(torch.nn.Linear(1, 1), jsonl='run.jsonl')\nfor _ in range(70):\n  with m.step(): pass"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)
    assert ul.MonitorSummary.load(tmp_path / "run.jsonl").steps >= 64


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    m = monitor(clock, jsonl=tmp_path / "run.jsonl")

    class Full:
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    assert m._output.writer is not None
    m._output.writer._file.close()
    m._output.writer._file = Full()
    with pytest.warns(
        ul.UllageWarning, match=r"run.jsonl: can't be written any more \(.*No space left.*goes on without it"
    ):
        steps(m, clock, [2.0])
    steps(m, clock, [2.0])
    m.close()
    assert m.summary().steps == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "has no header of a Monitor"),
        ('{"step": 1}\n', "line 1: the first line is no header of a Monitor"),
        (
            '{"monitor_schema":99}\n',
            r"line 1: written by a newer ullage \(monitor_schema 99, this one knows 1\); upgrade ullage",
        ),
        ('{"monitor_schema":1}\n', "line 1: Object missing required field"),
        (None, "can't be read"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ul.MonitorError, match=message):
        ul.MonitorSummary.load(path)


def test_a_line_that_is_broken_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written(path, [0.5, 0.5])
    path.write_bytes(path.read_bytes().replace(b'"step":1', b'"step":"x"'))
    with pytest.raises(ul.MonitorError, match="run.jsonl, line 3: Expected `int`"):
        ul.MonitorSummary.load(path)


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    with ul.Monitor(nn.Linear(1, 1), jsonl=tmp_path / "x"), pytest.raises(ul.ArgumentError, match="is there already"):
        ul.Monitor(nn.Linear(1, 1), jsonl=tmp_path / "x")
