"""Where the step runs: a device that is here, or an estimate for one of the table that is not."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ullage.cost import Device, find_device
from ullage.workload import Workload


@dataclass(frozen=True)
class DeviceChoice:
    """Where the step runs: a device that is here, or an estimate for one that is not."""

    name: str
    facts: Device
    estimate: bool
    memory_bytes: int | None

    @property
    def round_bytes(self) -> int:
        """Allocation granularity."""
        return 512 if self.facts.kind == "cuda" else 1


def choose_device(work: Workload, name: str | None) -> DeviceChoice:
    """Resolve `device=`; raises DeviceError for an unknown name."""
    here = "cpu" if work.factory is not None else work.instance_device().type
    if name is None:
        if here == "cuda" or (work.factory is not None and torch.cuda.is_available() and name is not None):
            properties = torch.cuda.get_device_properties(0)
            return DeviceChoice(properties.name, find_device("h200"), False, properties.total_memory)
        return DeviceChoice("cpu", find_device("cpu"), False, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    facts = find_device(name)
    return DeviceChoice(name, facts, name != here, facts.memory_bytes)
