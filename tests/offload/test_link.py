"""What pins memory, with CUDA made up; and the bandwidth of a link."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.streams import SimulatedLink
from ullage.offload import _link
from ullage.offload._link import CudaLink

ROOT = Path(__file__).parents[2]


def test_a_process_without_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ul.DeviceError, match="^device='cuda:1': this process sees no CUDA device"):
        ul.HostStore("1MiB", device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ul.DeviceError, match="^device='cuda:1': this process sees 1 CUDA devices"):
        ul.measure_link("cuda:1")


class Runtime:
    """What `torch.cuda` is to the code that pins memory."""

    class cudaError:  # noqa: N801 - CUDA's name
        success = 0

    def __init__(self, code: int) -> None:
        self.code, self.registered = code, []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.registered.append((address, nbytes, flags))
        return self.code

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802 - CUDA's name
        return {2: "out of memory"}[code]


def cuda_link(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> CudaLink:
    link = object.__new__(CudaLink)
    link.device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device", lambda _: warnings.catch_warnings())  # any context
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return link


def test_pinned_memory_is_exact_and_whole_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(0)
    slab = cuda_link(monkeypatch, runtime).pin(3 * 4096)
    assert runtime.registered == [(slab.data_ptr(), 3 * 4096, 0)] and slab.data_ptr() % 4096 == 0
    assert slab.dtype is torch.uint8 and slab.untyped_storage().nbytes() == 3 * 4096


def test_memory_that_can_not_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    link = cuda_link(monkeypatch, Runtime(2))
    text = "can't have 12.00 KiB .12288 bytes. pinned: CUDA can't pin it: out of memory; lower the capacity"
    with pytest.raises(ul.OffloadError, match=text) as caught:
        link.pin(3 * 4096)
    assert (caught.value.path, caught.value.nbytes) == (None, 3 * 4096)

    def none(*_: Any, **__: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(_link.mmap, "mmap", none)
    with pytest.raises(ul.OffloadError, match="pinned: Cannot allocate memory; lower the capacity"):
        link.pin(3 * 4096)


def test_link_bandwidth() -> None:
    """A byte takes a second each way; the host is never waited for."""
    link = SimulatedLink()
    found = ul.measure_link("cpu", 300_000_000, link=link)
    assert found == ul.offload.Bandwidth(1.0, 1.0, direct=True) and link.pinned == []
    assert ul.measure_link("cpu", 5_000, link=link) == ul.offload.Bandwidth(1.0, 1.0, direct=True)
    with pytest.raises(ul.ArgumentError, match="^nbytes=100: give at least 4096 bytes"):
        ul.measure_link("cpu", 100, link=link)
    with pytest.raises(ul.DeviceError, match="memory is the host's"):
        ul.measure_link("cpu")
