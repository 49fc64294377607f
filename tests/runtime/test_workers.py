"""The processes that judge random programs: every death is counted for the seed it came of, and the rest is judged all the same."""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import _workers
import programs as benchmark

from tests.runtime.programs import random_program

WORKER = """
import json, os, sys, time
first, count = int(sys.argv[2]), int(sys.argv[3])
for seed in range(first, first + count):
    print(json.dumps({"begun": seed}), flush=True)
    if seed == 3:
        sys.stderr.write("what it said last\\n")
        sys.stderr.flush()
        os.abort()
    if seed == 7:
        open(f"stuck {os.getpid()}", "x").close()
        time.sleep(600)
    kind = "mismatch" if seed == 5 else "equal"
    said = {"seed": seed, "kind": kind, "torch": "equal", "what": "", "defect": seed == 5, "selective": 1, "skipped": 1}
    print(json.dumps(said), flush=True)
"""


def _judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, processes: int = 1) -> list[dict[str, Any]]:
    """Patience is over as soon as a worker says, in a file, that it answers no more: no machine is too slow for it."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    found: list[dict[str, Any]] = []
    workers = _workers.Workers(script, 2, "large", found.append)

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> list[Any]:
            assert timeout == 1.0
            (key,) = self.get_map().values()
            (process,) = [p for p in list(workers._running) if p.stdout is key.fileobj]
            while True:
                stuck = (tmp_path / f"stuck {process.pid}").exists()
                ready = super().select(0.02)
                if ready or stuck:
                    return ready

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_workers.selectors, "DefaultSelector", Selector)
    monkeypatch.setattr(_workers, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(_workers, "BATCH", 4)
    assert workers.run(0, count, processes, None)
    return sorted(found, key=lambda f: f["seed"])


@pytest.mark.parametrize("processes", [1, 2])
def test_deaths_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    found = _judge(tmp_path, monkeypatch, 10, processes)
    kinds = ["equal"] * 10
    kinds[3], kinds[5], kinds[7] = "death", "mismatch", "death"
    assert [f["seed"] for f in found] == list(range(10)) and [f["kind"] for f in found] == kinds
    assert found[3]["what"] == "SIGABRT: what it said last" and found[7]["what"] == "no answer within 1 s"


def test_what_was_judged_is_written_when_time_is_over(tmp_path: Path) -> None:
    script = Path(benchmark.__file__)
    asked = ["--programs", "400", "--minutes", "0.0005", "--processes", "1", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *asked], capture_output=True, text=True, timeout=100, check=False
    )
    result = json.loads((tmp_path / "programs.json").read_text())
    assert done.returncode == 1 and result["complete"] is False and result["asked"] == 400
    assert "Stopped before all 400 programs were judged" in (tmp_path / "programs.md").read_text()


def test_a_tally_is_a_table() -> None:
    tally = benchmark.Tally()
    tally.add(_workers._death(4, "SIGSEGV"))
    tally.add({"seed": 5, "kind": "equal", "torch": "equal", "what": "", "defect": False, "selective": 2, "skipped": 1})
    assert tally.programs == 2 and (tally.selective, tally.skipped) == (2, 1)
    assert tally.defects == [{"seed": 4, "kind": "death", "torch": "not known", "what": "SIGSEGV"}]


def test_more_constructs_leave_a_seed_s_own_program() -> None:
    """What version 2 puts into a program does not change what the seed draws: without it, it is the program of version 1."""
    for seed in range(50):
        one, two = random_program(seed), random_program(seed, 2)
        assert (two.autocast, two.backward, two.varies, two.frozen) == (
            one.autocast,
            one.backward,
            one.varies,
            one.frozen,
        )
        own = [o for o in two.top.ops if getattr(o, "name", "") not in _more()]
        assert [type(o) for o in own] == [type(o) for o in one.top.ops]
    assert one == random_program(49) and two == random_program(49, 2)


def _more() -> list[str]:
    from tests.runtime.program_ops import MORE_NAMES

    return MORE_NAMES


def _children(pid: int) -> str:
    """Processes that any thread of this one has started."""
    return "".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))


def test_a_signal_in_the_middle_ends_it_with_what_there_is(tmp_path: Path) -> None:
    script = Path(benchmark.__file__)
    asked = ["--programs", "100000", "--processes", "2", "--output", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, str(script), *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not _children(process.pid):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads((tmp_path / "programs.json").read_text())["complete"] is False
