"""Open the store of a plan that offloads saved tensors."""

from __future__ import annotations

import os
from collections.abc import Collection

import torch

from ullage._errors import ApplyError, DeviceError
from ullage.apply._protocols import PlanToApply
from ullage.offload import DiskStore, HostStore


def open_store(plan: PlanToApply, tiers: Collection[str], device: torch.device) -> DiskStore | HostStore:
    """Make the store.

    Args:
        plan: which tier, and how large.
        tiers: those that its decisions name.
        device: of the model.

    Raises:
        ApplyError: the decisions name a tier that the plan does not have.
        OffloadError: its file can't be made, or memory not pinned.
        DeviceError: not for this device.
    """
    have = plan.tier.name if plan.tier is not None else ""
    for missing in sorted(set(tiers) - {have}):
        raise ApplyError(
            f"the plan's decisions offload saved tensors to {missing}, but the plan has no `{missing}`, which says where; plan again"
        )
    poison = os.environ.get("ULLAGE_POISON", "") not in ("", "0")
    if plan.host is not None:
        host = plan.host
        return HostStore(
            host.capacity_bytes,
            device=device,
            backlog_bytes=host.window_bytes,
            ahead_bytes=host.window_bytes,
            poison=poison,
        )
    disk = plan.disk
    assert disk is not None
    if disk.device_type != device.type:
        planned = f"the plan offloads saved tensors of {disk.device_type} to disk, and the model is on {device.type}"
        raise DeviceError(f"{planned}; move the model there, or plan again where it is")
    return DiskStore(
        disk.directory,
        disk.capacity_bytes,
        checksums=disk.checksums is True,
        threads=disk.threads,
        buffer_bytes=disk.buffer_bytes,
        backlog_bytes=disk.window_bytes,
        ahead_bytes=disk.window_bytes,
        poison=poison,
        device=device,
    )
