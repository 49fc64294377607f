"""What pins memory, with CUDA made up; and the bandwidth of a link."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.streams import SimulatedLink
from ullage.offload import _link
from ullage.offload._link import CudaLink


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


class Queue:
    """`torch.cuda.Stream`, whose work runs at once; what is asked of it is noted."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_event(self, event: Any) -> None:
        self.log.append(f"{self.name} waits for {event.of}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


def test_what_cuda_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are queued in streams of their own, between events; in the current one only what belongs there."""
    log: list[str] = []
    runtime = Runtime(0)
    link = cuda_link(monkeypatch, runtime)
    link._out, link._in, link._poison = Queue("out", log), Queue("in", log), None  # type: ignore[assignment]
    current = [Queue("main", log)]

    class Event:
        def __init__(self, enable_timing: bool, blocking: bool) -> None:
            assert enable_timing and blocking

        def record(self, stream: Queue) -> None:
            self.of = stream.name

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            log.append(f"host waits for {self.of}")

        def elapsed_time(self, other: Event) -> float:
            raise AssertionError("is not known before both are over")

    @contextlib.contextmanager
    def stream(queue: Queue) -> Iterator[None]:
        log.append(f"to {queue.name}")
        current.append(queue)
        yield
        current.pop()

    runtime.cudaHostUnregister = lambda address: log.append("unregistered") or 0  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: log.append(f"checked {code}"))
    source = torch.arange(200, dtype=torch.uint8)
    with ul.HostStore("64KiB", device="cpu", backlog_bytes=0, poison=True, link=link) as store:
        ticket = store.put(source.clone())
        assert log == ["out waits for main", "to out", "main waits for out"]
        log.clear()
        ticket.prefetch()
        assert log == ["to main", "in waits for main", "in waits for out", "to in"]
        log.clear()
        assert torch.equal(ticket.get(), source) and log == ["main waits for in"]
        log.clear()
        ticket.drop()
        assert log == ["out waits for in", "to out"]
        assert (store._engine.books.slab[:200] == 0xA5).all()
        log.clear()
    assert log[:2] == ["host waits for out", "host waits for in"] and log[-2:] == ["unregistered", "checked 0"]
