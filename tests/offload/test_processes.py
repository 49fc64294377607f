"""Other processes: two on one directory, one that is killed, one that forgets to close, forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import ullage as ul
from tests.offload.conftest import data

ROOT = Path(__file__).parents[2]

START = """
import sys, torch, ullage as ul
from tests.offload.conftest import data
store = ul.DiskStore(sys.argv[1], "32MiB", backlog_bytes="2MiB", poison=True)
first = store.put(data(1_000_000, 1))
store.flush()
print("ready", flush=True)
"""
WRITE_FOREVER = """
tickets = []
while True:
    tickets = [*tickets[-3:], store.put(data(8_000_000))]
"""
ROUND_TRIPS = """
sys.stdin.readline()
for i in range(5):
    tickets = [store.put(data(1_000_000 + n, 10 * i + n)) for n in range(5)]
    assert all(torch.equal(t.get(), data(t.nbytes, 10 * i + n)) for n, t in enumerate(tickets))
assert torch.equal(first.get(), data(1_000_000, 1))
print("equal", flush=True)
tickets = [store.put(data(1_000_000)) for _ in range(10)]  # and leaves without a close, in the middle of writes
"""


@contextmanager
def running(code: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", "-c", START + code, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def test_two_on_one_directory(tmp_path: Path) -> None:
    with running(ROUND_TRIPS, tmp_path) as other, ul.DiskStore(tmp_path, "32MiB", poison=True) as store:
        assert list(tmp_path.iterdir()) == []
        other.stdin.write("go\n")
        other.stdin.flush()
        for i in range(5):
            tickets = [store.put(data(1_000_000 + n, 100 + 10 * i + n)) for n in range(5)]
            store.flush()
            assert all(torch.equal(t.get(), data(t.nbytes, 100 + 10 * i + n)) for n, t in enumerate(tickets))
        said, wrong = other.communicate(timeout=60)
        assert (said, wrong, other.returncode) == ("equal\n", "", 0)
    assert list(tmp_path.iterdir()) == []


def test_killed_while_it_writes(tmp_path: Path) -> None:
    with running(WRITE_FOREVER, tmp_path) as other:
        assert list(tmp_path.iterdir()) == []  # nor is there anything before
        other.send_signal(signal.SIGKILL)
        assert other.wait(60) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_fork(tmp_path: Path) -> None:
    with ul.DiskStore(tmp_path, "1MiB", poison=True) as store:
        ticket, other = store.put(data(10_000)), store.put(data(10_000, 1))
        store.flush()
        other.prefetch()
        mine, theirs = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forks and threads
            child = os.fork()
        if not child:
            os.write(theirs, _in_child(store, ticket).encode())
            os._exit(0)
        os.close(theirs)
        os.waitpid(child, 0)
        with os.fdopen(mine) as said:
            found = said.read().splitlines()
        text = f"offload store in {tmp_path}: was made in process {os.getpid()}, this is a fork; make another"
        assert found == [text] * 4 + ["descriptor closed"]
        assert torch.equal(ticket.get(), data(10_000)) and torch.equal(other.get(), data(10_000, 1))
        with pytest.raises(ul.OffloadError, match="make another"):
            store._engine._pid -= 1
            store.poll()
        store._engine._pid += 1


def _in_child(store: ul.DiskStore, ticket: ul.offload.DiskTicket) -> str:
    said = []
    for use in (store.poll, ticket.get, ticket.prefetch, lambda: store.put(data(5))):
        try:
            use()
        except ul.OffloadError as error:
            said.append(str(error))
    ticket.drop()
    del ticket
    store.close()
    try:
        os.fstat(store._engine.mover.file.fd)
    except OSError:
        said.append("descriptor closed")
    return "\n".join(said)
