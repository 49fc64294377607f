"""A device's view of a step: begin, end and memory. Nothing here waits for a GPU, but for `wait`."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ullage._errors import ArgumentError

_PAGE = os.sysconf("SC_PAGE_SIZE")
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(slots=True)
class Interval:
    """One step of a device: marks of its begin and end, and the readings at its end."""

    start: Any
    stop: Any = None
    max_allocated_bytes: int | None = None
    max_reserved_bytes: int | None = None
    alloc_retries: int | None = None
    ooms: int | None = None


class Probe(Protocol):
    """Questions of a monitor to a device."""

    name: str
    not_available: dict[str, str]

    def begin(self) -> Interval:
        """A step begins."""

    def end(self, step: Interval) -> None:
        """It ends: mark the moment and read the memory."""

    def drop(self, step: Interval) -> None:
        """It failed; the device may be in any state."""

    def ready(self, step: Interval) -> bool:
        """Has the device reached the end of the step?"""

    def wait(self, step: Interval) -> None:
        """Wait until it has."""

    def seconds(self, step: Interval) -> float:
        """From begin to end, once ready."""

    def hold(self, loss: Tensor) -> Callable[[], float]:
        """Take a loss without waiting for it; the returned function gives it, once the step is ready."""


class HostProbe:
    """The host's clock. A CPU has no record of its allocator's peak that is cheap enough to watch."""

    name = ""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.not_available = {
            "peak allocated": "torch's CPU allocator keeps no record of its peak (ullage.measure makes one); the process's memory is not that"
        }

    def begin(self) -> Interval:
        """Note the time."""
        return Interval(self.clock())

    def end(self, step: Interval) -> None:
        """Note the time."""
        step.stop = self.clock()

    def drop(self, step: Interval) -> None:
        """Nothing is held."""

    def ready(self, step: Interval) -> bool:
        """Always."""
        return True

    def wait(self, step: Interval) -> None:
        """Nothing to wait for."""

    def seconds(self, step: Interval) -> float:
        """Seconds by the clock."""
        return float(step.stop - step.start)

    def hold(self, loss: Tensor) -> Callable[[], float]:
        """It is there already."""
        value = loss.item()
        return lambda: value


# Steps that are open now, per device index: resetting the allocator's peaks for one must not take them from another.
_open_steps: dict[int, list[Interval]] = {}


class CudaProbe:
    """Events on the device's current stream, and the caching allocator's own peaks and counters."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index = device.index if device.index is not None else torch.cuda.current_device()
        self.name = torch.cuda.get_device_name(self.index)
        self.not_available: dict[str, str] = {}
        self._free: list[Tensor] = []  # pinned scalars

    def begin(self) -> Interval:
        """Reset the allocator's peaks, having told them to every step that is open; record an event."""
        others = _open_steps.setdefault(self.index, [])
        if others:
            _note_peaks(others, torch.cuda.memory_stats_as_nested_dict(self.index))
        torch.cuda.reset_peak_memory_stats(self.index)
        stats = torch.cuda.memory_stats_as_nested_dict(self.index)
        step = Interval(self._mark(), None, 0, 0, stats.get("num_alloc_retries", 0), stats.get("num_ooms", 0))
        others.append(step)
        return step

    def end(self, step: Interval) -> None:
        """Record an event; read peaks and counters, which are the host's and up to date."""
        step.stop = self._mark()
        self._read(step)

    def _read(self, step: Interval) -> None:
        stats = torch.cuda.memory_stats_as_nested_dict(self.index)
        steps = _open_steps[self.index]
        _note_peaks(steps, stats)
        steps.remove(step)
        step.alloc_retries = stats.get("num_alloc_retries", 0) - (step.alloc_retries or 0)
        step.ooms = stats.get("num_ooms", 0) - (step.ooms or 0)

    def drop(self, step: Interval) -> None:
        """Read what the allocator counted; it still can after running out of memory."""
        if any(s is step for s in _open_steps[self.index]):
            self._read(step)

    def ready(self, step: Interval) -> bool:
        """Has the stream passed the last event?"""
        return bool(step.stop.query())

    def wait(self, step: Interval) -> None:
        """Wait for the last event."""
        step.stop.synchronize()

    def seconds(self, step: Interval) -> float:
        """Between the events."""
        return float(step.start.elapsed_time(step.stop)) / 1e3

    def hold(self, loss: Tensor) -> Callable[[], float]:
        """Copy it to pinned memory, on the stream: the event at the step's end comes after."""
        if loss.device.type == "cpu":
            value = loss.item()
            return lambda: value
        if loss.device.index != self.index:
            raise ArgumentError(
                f"loss: is on {loss.device}, the monitor watches cuda:{self.index}; give it as a tensor there"
            )
        into = self._free.pop() if self._free else torch.empty((), dtype=torch.float32, pin_memory=True)
        into.copy_(loss.detach().float(), non_blocking=True)

        def value_of() -> float:
            value = into.item()
            self._free.append(into)
            return value

        return value_of

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.index))
        return event


def _note_peaks(steps: list[Interval], stats: dict[str, Any]) -> None:
    allocated, reserved = (stats[kind]["all"]["peak"] for kind in ("allocated_bytes", "reserved_bytes"))
    for step in steps:
        step.max_allocated_bytes = max(step.max_allocated_bytes or 0, allocated)
        step.max_reserved_bytes = max(step.max_reserved_bytes or 0, reserved)


class ProcessMemory:
    """Resident memory of this process, which is Python, libraries and all: never the peak of a step."""

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/self/statm", os.O_RDONLY)
        except OSError:  # not Linux
            self._file = None

    def read(self) -> tuple[int | None, int]:
        """(bytes resident now or None, most bytes resident so far)."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        if self._file is None:
            return None, most
        now = int(os.pread(self._file, 64, 0).split(b" ", 2)[1]) * _PAGE
        return now, max(now, most)  # the kernel sums them up at other moments

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def probe_for(device: torch.device, clock: Callable[[], float] | None) -> Probe:
    """The probe of a device. ArgumentError: neither a CPU nor CUDA."""
    if device.type == "cuda":
        return CudaProbe(device)
    if device.type == "cpu":
        return HostProbe(clock or time.perf_counter)
    raise ArgumentError(f"model: is on {device}; a Monitor watches steps on a CPU or on CUDA")
