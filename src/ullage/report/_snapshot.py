"""The timeline as PyTorch's memory snapshot, as `torch.cuda.memory._snapshot()` makes one of a real run.

pytorch.org/memory_viz and `torch.cuda._memory_viz` read it. What is allocated is ours to the byte. Addresses, and with them what
is reserved, are not predicted: storages are laid out by best fit in one segment, so that the pictures have something to show.
"""

from __future__ import annotations

import pickle
from sys import intern
from typing import Any

import numpy as np

from ullage.report._arena import Arena
from ullage.report._records import INSIDE, PHASES, WORKSPACE
from ullage.report._timeline import Timeline

BEGIN = 0x7F0000000000  # an address as CUDA gives them
PROTOCOL = 4  # the newest that the viewer's own unpickler knows
NO_LINE = "(no source line)"
BEFORE = "before the step"

Frames = list[dict[str, Any]]


def pickled(t: Timeline, until: int | None = None) -> bytes:
    """See `snapshot`. The same timeline gives the same bytes."""
    return pickle.dumps(snapshot(t, until), PROTOCOL)


def snapshot(t: Timeline, until: int | None = None) -> dict[str, Any]:
    """The snapshot of both steps (None), or up to the highest moment of an event, with what is alive then as its state."""
    return _Writer(t).write(len(t) - 1 if until is None else until, until is not None)


class _Writer:
    def __init__(self, t: Timeline) -> None:
        self.t = t
        self.arena = Arena(BEGIN)
        self.entries: list[dict[str, Any]] = []
        self.active: dict[int, dict[str, Any]] = {}  # entries of what is alive, by address
        self.clock = np.round(t.start_seconds * 1e6).astype(np.int64).tolist()
        self.frames: dict[Any, Frames] = {}  # shared, which makes the file a fraction
        self.recomputed = t.events.recomputed.values.tolist()

    def write(self, last: int, at_its_peak: bool) -> dict[str, Any]:
        t, a = self.t, self.t.allocations
        born, dying = _by_event(a.birth.values, len(t)), _by_event(a.death.values, len(t))
        inside = t.events.inside_bytes.values.tolist()
        address: dict[int, int] = {}
        self._alloc(t.workspace_bytes, WORKSPACE, self._before("", WORKSPACE), 0)
        for i in range(-1, last + 1):
            time = self.clock[max(i, 0)]
            for k in born.get(i, ()):
                address[k] = self._storage(k, i, time)
            if i < 0:
                continue
            extra = self._alloc(inside[i], INSIDE, self._of_event(i), time)
            if at_its_peak and i == last:
                break
            self._free(extra, time)
            for k in dying.get(i, ()):
                self._free(address.pop(k), time)
        return {"segments": [self._segment()], "device_traces": [[self._segment_alloc(), *self.entries]]}

    def _storage(self, k: int, birth: int, time: int) -> int:
        a, t = self.t.allocations, self.t
        category = t.categories[a.category.values[k]]
        module = t.modules[a.module.values[k]]
        name = t.names[a.name.values[k]]
        frames = self._of_event(birth) if birth >= 0 else self._before(module, name or category)
        return self._alloc(int(a.nbytes.values[k]), category, frames, time)

    def _alloc(self, nbytes: int, category: str, frames: Frames, time: int) -> int:
        """Note an allocation; its address, or -1 if there is nothing to allocate."""
        if not nbytes:
            return -1
        address = self.arena.take(nbytes)
        entry = self._entry("alloc", address, nbytes, frames, time) | {"category": intern(category)}
        self.entries.append(entry)
        self.active[address] = entry
        return address

    def _free(self, address: int, time: int) -> None:
        if address < 0:
            return
        made = self.active.pop(address)
        for action in ("free_requested", "free_completed"):
            self.entries.append(self._entry(action, address, made["size"], made["frames"], time))
        self.arena.give(address, made["size"])

    def _entry(self, action: str, address: int, nbytes: int, frames: Frames, time: int) -> dict[str, Any]:
        return {"action": action, "addr": address, "size": nbytes, "stream": 0, "frames": frames, "time_us": time}

    def _segment_alloc(self) -> dict[str, Any]:
        # memory_viz can't draw categories of which none is "unknown", and a segment's is not shown
        made = self._entry("segment_alloc", BEGIN, self.arena.end - BEGIN, [], 0)
        return made | {"category": "unknown"}

    def _segment(self) -> dict[str, Any]:
        """All of it, with what is alive now."""
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

    def _of_event(self, i: int) -> Frames:
        """The op at its source line, its module, and its phase; the innermost first, as torch has frames."""
        e, t = self.t.events, self.t
        again = self.recomputed[i]
        phase, module = int(e.phase.values[i]), int(t.innermost[i])
        key = (int(e.op.values[i]), int(e.source.values[i]), module, phase, again)
        if key not in self.frames:
            file, _, line = t.sources[key[1]].rpartition(":")
            self.frames[key] = [
                _frame(t.ops[key[0]], file or NO_LINE, int(line or 0)),
                _frame(t.modules[module] or "(root)" if module >= 0 else "(no module)", "module"),
                _frame(f"{PHASES[phase]}, recomputed" if again else PHASES[phase], "phase"),
            ]
        return self.frames[key]

    def _before(self, module: str, name: str) -> Frames:
        key = (module, name)
        if key not in self.frames:
            self.frames[key] = [_frame(name, NO_LINE), _frame(module or "(root)", "module"), _frame(BEFORE, "phase")]
        return self.frames[key]


def _frame(name: str, file: str, line: int = 0) -> dict[str, Any]:
    # interned: pickle writes an object again that is equal to one it has written, but not the same
    return {"name": intern(name), "filename": intern(file), "line": line}


def _block(address: int, size: int, requested: int, state: str, frames: Frames) -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": requested, "state": state, "frames": frames}


def _by_event(of_storage: Any, events: int) -> dict[int, list[int]]:
    """Storages by the event at which something happens to them; what happens after the last one is left out."""
    found: dict[int, list[int]] = {}
    for k, i in enumerate(of_storage.tolist()):
        if i < events:
            found.setdefault(i, []).append(k)
    return found
