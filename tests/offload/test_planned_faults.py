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


def test_a_drive_that_returns_other_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checksums it is found; without, the gradients are wrong, which only a drive can be blamed for."""
    work = tower()
    wanted, real = backward(work.model, work.batch), os.preadv

    def one_bit_is_other(fd: int, buffers: Any, *rest: Any) -> int:
        n = real(fd, buffers, *rest)
        buffers[0][0] ^= 1
        return n

    for checksums in (False, True):
        plan = offload(work, tmp_path, checksums=checksums)
        again = msgspec.json.decode(msgspec.json.encode(plan), type=ul.Plan)
        assert again == plan and again.disk is not None and (again.disk.checksums is True) == checksums
        assert (b"checksums" in msgspec.json.encode(plan)) == (", checksums" in str(plan)) == checksums
        with again.apply(work.model) as handle:
            assert same(backward(work.model, work.batch), wanted)
            reads = handle.report().store.reads  # type: ignore[union-attr]
            assert (f"checksums of all {reads} reads agree" in str(handle.report())) == checksums and reads > 0
            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", one_bit_is_other)
                if checksums:
                    with pytest.raises(ul.OffloadError, match="checksum mismatch in .* they are not what was written"):
                        backward(work.model, work.batch)
                else:
                    assert not same(backward(work.model, work.batch), wanted)


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
