"""The device that the step runs on: one of this machine, or one of the table, for which bytes and times are estimated."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ullage.cost import Device, device_name, devices, find_device
from ullage.workload import Workload


@dataclass(frozen=True)
class DeviceChoice:
    """The device of a study.

    Attributes:
        name: its name in the table, or the name that a CUDA device of this machine gives itself.
        facts: its row; for a CUDA device of this machine the row with the nearest memory.
        estimate: the device is not in this machine, so nothing was timed or measured on it.
        memory_bytes: its memory without its context; None if that is not known.
        tensors: device type of the tensors that the step runs on.
    """

    name: str
    facts: Device
    estimate: bool
    memory_bytes: int | None
    tensors: str

    @property
    def round_bytes(self) -> int:
        """Allocation granularity."""
        return 512 if self.facts.kind == "cuda" else 1

    @property
    def as_cuda(self) -> bool:
        """Is a CUDA device estimated from what runs on the CPU?"""
        return self.facts.kind == "cuda" and self.tensors == "cpu"


def choose_device(work: Workload, name: str | None) -> DeviceChoice:
    """Resolve `device=`.

    Raises:
        DeviceError: the name is not in the table.
    """
    here = "cpu" if work.factory is not None else work.instance_device().type
    if name is not None:
        name = device_name(name)
        facts = find_device(name)
        return DeviceChoice(name, facts, name != here, facts.memory_bytes - facts.context_bytes, here)
    if here == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows = [d for d in devices().values() if d.kind == "cuda"]
        nearest = min(rows, key=lambda d: abs(d.memory_bytes - properties.total_memory))
        memory = properties.total_memory - nearest.context_bytes
        return DeviceChoice(properties.name, nearest, False, memory, here)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceChoice("cpu", find_device("cpu"), False, memory, here)
