"""Worker processes that judge random programs, and what is counted when one of them dies."""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 500  # programs of one process: importing torch is paid once for them
PATIENCE_SECONDS = 300.0  # of one program; then its process is ended, and it counts as a death

Found = dict[str, Any]  # what became of one program


def work(first: int, count: int, constructs: int, size: str) -> None:
    """A worker: before each program its seed, after it what became of it, a line each."""
    import torch
    from tests.runtime.programs import SIZES, random_program
    from tests.runtime.running import Leaks, checked

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = sys.stdout
    with Leaks() as leaks:
        for seed in range(first, first + count):
            print(json.dumps({"begun": seed}), file=out, flush=True)
            v = checked(random_program(seed, constructs, SIZES[size]), leaks)
            found = {"seed": seed, "kind": v.kind, "torch": v.torch, "what": v.what[:300] if v.kind != "equal" else ""}
            found |= {"defect": v.defect, "selective": v.selective, "skipped": v.skipped}
            print(json.dumps(found), file=out, flush=True)


def _how_it_ended(code: int | None, patience: bool, stderr: str) -> str:
    if patience:
        return f"no answer within {PATIENCE_SECONDS:.0f} s"
    name = f"exit code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
    last = " ".join(stderr.strip().splitlines()[-2:])
    return f"{name}: {last[-250:]}" if last else name


@dataclass
class Batch:
    """Seeds that are still to be judged."""

    first: int
    count: int


class Workers:
    """Judges the programs of some seeds in processes; each program that ends its process is found as a death.

    Args:
        script: what is started as a worker.
        constructs: which constructs programs have.
        size: how large they are.
        found: called with what became of each program, one call at a time.
    """

    def __init__(self, script: Path, constructs: int, size: str, found: Callable[[Found], None]) -> None:
        self.script, self.constructs, self.size, self._found = script, constructs, size, found
        self._batches: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, first: int, count: int, processes: int, seconds: float | None) -> bool:
        """Judge them all; True if time was enough for that."""
        for k in range(0, count, BATCH):
            self._batches.put(Batch(first + k, min(BATCH, count - k)))
        threads = [threading.Thread(target=self._drain, daemon=True) for _ in range(processes)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds if seconds is not None else float("inf")
        try:
            while any(thread.is_alive() for thread in threads) and not self._stop.is_set() and time.monotonic() < end:
                time.sleep(0.1)  # in slices, so that a signal comes through
            complete = not any(thread.is_alive() for thread in threads)
        finally:
            self.stop()
            while any(thread.is_alive() for thread in threads):  # one may be starting a process just now
                for process in list(self._running):
                    process.kill()
                time.sleep(0.1)
        return complete

    def stop(self) -> None:
        """Have `run` end the processes; what they had not finished is not counted. May be called by a signal's handler: takes no lock."""
        self._stop.set()

    def _drain(self) -> None:
        while not self._stop.is_set():
            try:
                batch = self._batches.get_nowait()
            except queue.Empty:
                return
            while batch.count and not self._stop.is_set():
                self._process(batch)

    def _process(self, batch: Batch) -> None:
        """One process for what is left of a batch; it ends with the batch or with a death."""
        asked = [
            "--work",
            str(batch.first),
            str(batch.count),
            "--constructs",
            str(self.constructs),
            "--size",
            self.size,
        ]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, str(self.script), *asked], stdout=subprocess.PIPE, stderr=errors
            )
            self._running.add(process)
            begun, patience = self._read(process, batch)
            process.kill() if patience else process.wait()
            code = process.wait()
            assert process.stdout is not None
            process.stdout.close()
            self._running.discard(process)
            errors.seek(0)
            stderr = errors.read().decode(errors="replace")
        if self._stop.is_set() or (code == 0 and not batch.count):
            return
        if begun is None:
            if not batch.count:  # it had judged everything, and ended badly after that
                self._tell(_death(batch.first - 1, "at exit: " + _how_it_ended(code, patience, stderr)))
                return
            raise RuntimeError(f"a worker did not start: {_how_it_ended(code, patience, stderr)}")
        self._tell(_death(begun, _how_it_ended(code, patience, stderr)))
        batch.count -= begun + 1 - batch.first
        batch.first = begun + 1

    def _read(self, process: subprocess.Popen[bytes], batch: Batch) -> tuple[int | None, bool]:
        """Take what a process says until it ends: the seed it was at, and whether it has taken too long."""
        assert process.stdout is not None
        begun: int | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            rest = b""
            while True:
                if not selector.select(PATIENCE_SECONDS):
                    return begun, True
                read = process.stdout.read1()  # type: ignore[attr-defined]
                if not read:
                    return begun, False
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    said = json.loads(line)
                    if "begun" in said:
                        begun = said["begun"]
                        continue
                    begun = None
                    batch.first, batch.count = said["seed"] + 1, batch.count - 1
                    self._tell(said)

    def _tell(self, found: Found) -> None:
        with self._lock:
            if not self._stop.is_set() or found["kind"] != "death":
                self._found(found)


def _death(seed: int, what: str) -> Found:
    return {
        "seed": seed, "kind": "death", "torch": "not known", "what": what, "defect": True, "selective": 0, "skipped": 0,
    }  # fmt: skip
