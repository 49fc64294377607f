"""Allocations and frees in the shape of PyTorch's memory snapshot, as `torch.cuda.memory._snapshot()` makes one.

pytorch.org/memory_viz and `torch.cuda._memory_viz` read it.
"""

from __future__ import annotations

from sys import intern
from typing import Any

from ullage.report._arena import Arena

BEGIN = 0x7F0000000000  # an address as CUDA gives them
NO_LINE = "(no source line)"
BEFORE = "before the step"

Frames = list[dict[str, Any]]


class Blocks:
    """Live blocks in one segment; addresses are given by best fit.

    Attributes:
        entries: the history.
        active: entries of living blocks, by address.
    """

    def __init__(self) -> None:
        self.arena = Arena(BEGIN)
        self.entries: list[dict[str, Any]] = []
        self.active: dict[int, dict[str, Any]] = {}

    def snapshot(self) -> dict[str, Any]:
        """The whole snapshot: the history, and the blocks alive now as its state."""
        return {"segments": [self._segment()], "device_traces": [[self._segment_alloc(), *self.entries]]}

    def alloc(self, nbytes: int, category: str, frames: Frames, time: int) -> int:
        """Note an allocation; its address, or -1 if there is nothing to allocate."""
        if not nbytes:
            return -1
        address = self.arena.take(nbytes)
        entry = self._entry("alloc", address, nbytes, frames, time) | {"category": intern(category)}
        self.entries.append(entry)
        self.active[address] = entry
        return address

    def free(self, address: int, time: int) -> None:
        """Note that an address is free again; -1: there was nothing."""
        if address < 0:
            return
        made = self.active.pop(address)
        for action in ("free_requested", "free_completed"):
            self.entries.append(self._entry(action, address, made["size"], made["frames"], time))
        self.arena.give(address, made["size"])

    def _entry(self, action: str, address: int, nbytes: int, frames: Frames, time: int) -> dict[str, Any]:
        return {"action": action, "addr": address, "size": nbytes, "stream": 0, "frames": frames, "time_us": time}

    def _segment_alloc(self) -> dict[str, Any]:
        # memory_viz draws categories only if one is "unknown", and it does not show a segment's
        made = self._entry("segment_alloc", BEGIN, self.arena.end - BEGIN, [], 0)
        return made | {"category": "unknown"}

    def _segment(self) -> dict[str, Any]:
        """The segment, with the blocks alive now."""
        blocks, at = [], BEGIN
        for address, entry in sorted(self.active.items()):
            if at < address:
                blocks.append(_block(at, address - at, 0, "inactive", []))
            blocks.append(_block(address, entry["size"], entry["size"], "active_allocated", entry["frames"]))
            at = address + entry["size"]
        if at < self.arena.end:
            blocks.append(_block(at, self.arena.end - at, 0, "inactive", []))
        alive = sum(entry["size"] for entry in self.active.values())
        sizes = dict.fromkeys(("allocated_size", "active_size", "requested_size"), alive)
        kind = {"device": 0, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0), "frames": []}
        return {"address": BEGIN, "total_size": self.arena.end - BEGIN, **sizes, **kind, "blocks": blocks}


def frame(name: str, file: str, line: int = 0) -> dict[str, Any]:
    """A frame of a stack."""
    # interned: pickle writes an object again that is equal to one it has written, but not the same
    return {"name": intern(name), "filename": intern(file), "line": line}


def _block(address: int, size: int, requested: int, state: str, frames: Frames) -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": requested, "state": state, "frames": frames}
