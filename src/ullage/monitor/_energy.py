"""Joules: counters of GPUs by NVML, of processors by RAPL. What can't be read is said.

Counters move in steps of 10 to 100 ms, and reading one takes the host some microseconds, so they are read once a second, not once a step.

RAPL is read from the files of Linux's powercap. No library fits: pyRAPL and pyJoules are not kept (last releases 2019 and 2020),
codecarbon and zeus bring pandas and more, and zeus watches the counters from a process that it spawns, which imports the user's script again.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
INTERVAL_SECONDS = 1.0
_MOST_WATTS = 1000.0  # no socket takes more: for so long a counter can't have come around


class _Unreadable(Exception):
    """A counter can't be read; the message says why."""


class RaplPackage:
    """The energy counter of one processor socket: microjoules that start again at `max_energy_range_uj`."""

    def __init__(self, folder: Path) -> None:
        self.name = (folder / "name").read_text().strip()
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._file = os.open(folder / "energy_uj", os.O_RDONLY)
        self._last = self._now()
        self.longest = self._range / 1e6 / _MOST_WATTS  # seconds that may lie between two readings

    def _now(self) -> int:
        return int(os.pread(self._file, 32, 0))

    def since(self) -> float:
        """Joules since the reading before."""
        now = self._now()
        spent, self._last = (now - self._last) % (self._range + 1), now
        return spent / 1e6

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def rapl_packages(root: Path) -> list[RaplPackage]:
    """The sockets of this machine. _Unreadable: there are none, or they can't be read."""
    found: list[RaplPackage] = []
    try:
        for folder in sorted(root.glob("intel-rapl:*")):  # AMD's are called that too
            if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package"):
                found.append(RaplPackage(folder))
    except PermissionError as error:
        for package in found:
            package.close()
        raise _Unreadable(f"{error.filename} is readable by root only") from error
    except (OSError, ValueError) as error:
        for package in found:
            package.close()
        raise _Unreadable(f"the processor's energy counter can't be read: {error}") from error
    if not found:
        raise _Unreadable(f"this machine shows no energy counter of its processor (RAPL) under {root}")
    return found


class NvmlGpu:
    """The energy counter of one GPU: millijoules since its driver was loaded."""

    def __init__(self, index: int) -> None:
        try:
            import pynvml
        except ImportError:
            raise _Unreadable("nvidia-ml-py is not installed: pip install 'ullage[energy]'") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise _Unreadable(f"NVML does not start: {error}") from error
        try:
            # not by index: CUDA_VISIBLE_DEVICES renumbers what torch sees
            uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._last = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError as error:
            pynvml.nvmlShutdown()
            raise _Unreadable(f"NVML gives no energy of this GPU: {error}") from error
        self.name = f"cuda:{index}"

    def since(self) -> float:
        """Joules since the reading before."""
        now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        spent, self._last = now - self._last, now
        return float(spent) / 1e3

    def close(self) -> None:
        """Shut NVML down."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


@dataclass(frozen=True)
class Spent:
    """Joules of some steps in a row; None: not metered."""

    gpu_joules: float | None
    cpu_joules: float | None
    steps: int
    samples: int | None


class Energy:
    """Both meters, read about once a second at the end of a step. `failed`: why no more joules come.

    Args:
        cuda_index: the GPU, or None.
        root: where powercap is.
    """

    def __init__(self, cuda_index: int | None, root: Path | None = None) -> None:
        self.not_available: dict[str, str] = {}
        self.failed = ""
        self._cpu: list[RaplPackage] = []
        self._gpu: list[NvmlGpu] = []
        try:
            self._cpu = rapl_packages(root or POWERCAP)
        except _Unreadable as why:
            self.not_available["processor energy"] = str(why)
        if cuda_index is not None:
            try:
                self._gpu = [NvmlGpu(cuda_index)]
            except _Unreadable as why:
                self.not_available["GPU energy"] = str(why)
        self.names = [*(m.name for m in self._gpu), *(m.name for m in self._cpu)]
        self._longest = min((p.longest for p in self._cpu), default=math.inf)
        self._began: float | None = None
        self._steps = 0
        self._samples: int | None = 0

    def begin(self, now: float) -> None:
        """A step begins at `now`; at the first one joules start to count."""
        if self._began is None and self.names:
            self._start(now)
            self._read()

    def _start(self, now: float) -> None:
        self._began, self._steps, self._samples = now, 0, 0

    def end(self, samples: int | None, now: float) -> Spent | None:
        """End a step at `now`, in seconds; return the energy spent, if it is time to read."""
        if self._began is None:
            return None
        self._steps += 1
        self._samples = None if samples is None or self._samples is None else self._samples + samples
        passed = now - self._began
        if passed < INTERVAL_SECONDS:
            return None
        spent, steps, total = self._read(), self._steps, self._samples
        if spent is None:
            return None
        self._start(now)
        # after so long a counter may have come around more than once
        return Spent(*spent, steps, total) if passed < self._longest else None

    def _read(self) -> tuple[float | None, float | None] | None:
        try:
            gpu, cpu = ([m.since() for m in meters] for meters in (self._gpu, self._cpu))
        except Exception as error:  # the driver's, or a file that is gone: training goes on
            self.failed = f"a counter failed: {type(error).__name__}: {error}"
            self.close()
            return None
        return (sum(gpu) if gpu else None), (sum(cpu) if cpu else None)

    def close(self) -> None:
        """Close the counters' files."""
        meters: list[Any] = [*self._gpu, *self._cpu]
        for meter in meters:
            meter.close()
        self._gpu, self._cpu, self.names, self._began = [], [], [], None
