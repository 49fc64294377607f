"""A disk that fails in mid-step: a clear error, no wrong gradient, nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import ullage as ul
from tests.offload.planned import (
    backward,
    offload,
    same,
    store_of,
    tower,
)


def fails(code: int) -> Callable[..., int]:
    def transfer(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    return transfer


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_in_mid_step(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tower()
    wanted, plan = backward(work.model, work.batch), offload(work, tmp_path)
    before = {k: v.clone() for k, v in work.model.state_dict().items()}
    with plan.apply(work.model):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fails(code))
            with pytest.raises(ul.OffloadError, match=os.strerror(code)):
                backward(work.model, work.batch)
    assert all(torch.equal(v, before[k]) for k, v in work.model.state_dict().items())
    assert same(backward(work.model, work.batch), wanted)
    with plan.apply(work.model):
        assert same(backward(work.model, work.batch), wanted)  # the next run starts clean
    assert not list(tmp_path.iterdir())


def test_a_read_that_fails_in_mid_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tower()
    wanted, plan = backward(work.model, work.batch), offload(work, tmp_path)
    with plan.apply(work.model) as handle:
        work.model.zero_grad()
        loss = work.model(work.batch).square().mean()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fails(errno.EIO))
            with pytest.raises(ul.OffloadError, match="Input/output error"):
                loss.backward()
        del loss
        assert store_of(handle).tickets == 0
        assert same(backward(work.model, work.batch), wanted)


def test_a_file_that_is_too_small(tmp_path: Path) -> None:
    work = tower()
    wanted, plan = backward(work.model, work.batch), offload(work, tmp_path)
    assert plan.disk is not None
    small = msgspec.structs.replace(plan, disk=msgspec.structs.replace(plan.disk, capacity_bytes=2**20))
    with small.apply(work.model), pytest.raises(ul.OffloadError, match="capacity=1048576"):
        work.model(work.batch)
    with plan.apply(work.model):
        assert same(backward(work.model, work.batch), wanted)


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    work, there = tower(), tmp_path / "there"
    there.mkdir()
    plan = offload(work, there)
    there.rmdir()
    with pytest.raises(ul.OffloadError, match="there"):
        plan.apply(work.model)
    assert not any("forward" in m.__dict__ for m in work.model.modules())  # nothing was touched
    there.mkdir()
    with plan.apply(work.model):
        there.rmdir()  # the file has no name: it is still there
        backward(work.model, work.batch)


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
import torch, ullage as ul
from tests.offload.planned import tower, offload
from pathlib import Path
work = tower(8)
with offload(work, Path({str(tmp_path)!r})).apply(work.model):
    print("started", flush=True)
    while True:
        work.model(work.batch).sum().backward()
"""
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root, text=True)
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not list(tmp_path.iterdir())


def test_the_file_goes_with_the_handle(tmp_path: Path) -> None:
    work = tower(2)
    plan = offload(work, tmp_path)
    inst = work.instance()
    model = inst.model
    handle = plan.apply(model)
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    gc.collect()
    gc.disable()
    try:
        del handle, model, inst, work
        assert len(os.listdir("/proc/self/fd")) == files - 1  # noqa: PTH208
    finally:
        gc.enable()
