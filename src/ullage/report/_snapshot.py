"""The timeline as PyTorch's memory snapshot, as `torch.cuda.memory._snapshot()` makes one of a real run.

pytorch.org/memory_viz and `torch.cuda._memory_viz` read it. Allocated bytes are the predicted ones. Addresses, and with them reserved
bytes, are not predicted: storages are laid out by best fit in one segment, so that the pictures have something to show.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from ullage.report._blocks import BEFORE, NO_LINE, Blocks, Frames, frame
from ullage.report._records import INSIDE, PHASES, WORKSPACE
from ullage.report._timeline import Timeline

PROTOCOL = 4  # the newest that the viewer's own unpickler knows


def pickled(t: Timeline, until: int | None = None) -> bytes:
    """See `snapshot`. The same timeline gives the same bytes."""
    return pickle.dumps(snapshot(t, until), PROTOCOL)


def snapshot(t: Timeline, until: int | None = None) -> dict[str, Any]:
    """Return the snapshot of both steps (None), or up to the highest moment of an event, with the storages alive then as its state."""
    return _Writer(t).write(len(t) - 1 if until is None else until, until is not None)


class _Writer:
    def __init__(self, t: Timeline) -> None:
        self.t = t
        self.blocks = Blocks()
        self.clock = np.round(t.start_seconds * 1e6).astype(np.int64).tolist()
        self.frames: dict[Any, Frames] = {}  # shared, which makes the file a fraction
        self.recomputed = t.events.recomputed.values.tolist()

    def write(self, last: int, at_its_peak: bool) -> dict[str, Any]:
        t, a = self.t, self.t.allocations
        born, dying = _by_event(a.birth.values, len(t)), _by_event(a.death.values, len(t))
        inside = t.events.inside_bytes.values.tolist()
        address: dict[int, int] = {}
        self.blocks.alloc(t.workspace_bytes, WORKSPACE, self._before("", WORKSPACE), 0)
        for i in range(-1, last + 1):
            time = self.clock[max(i, 0)]
            for k in born.get(i, ()):
                address[k] = self._storage(k, i, time)
            if i < 0:
                continue
            extra = self.blocks.alloc(inside[i], INSIDE, self._of_event(i), time)
            if at_its_peak and i == last:
                break
            self.blocks.free(extra, time)
            for k in dying.get(i, ()):
                self.blocks.free(address.pop(k), time)
        return self.blocks.snapshot()

    def _storage(self, k: int, birth: int, time: int) -> int:
        a, t = self.t.allocations, self.t
        category = t.categories[a.category.values[k]]
        module = t.modules[a.module.values[k]]
        name = t.names[a.name.values[k]]
        frames = self._of_event(birth) if birth >= 0 else self._before(module, name or category)
        return self.blocks.alloc(int(a.nbytes.values[k]), category, frames, time)

    def _of_event(self, i: int) -> Frames:
        """The op at its source line, its module, and its phase; the innermost first, as torch has frames."""
        e, t = self.t.events, self.t
        again = self.recomputed[i]
        phase, module = int(e.phase.values[i]), int(t.innermost[i])
        key = (int(e.op.values[i]), int(e.source.values[i]), module, phase, again)
        if key not in self.frames:
            file, _, line = t.sources[key[1]].rpartition(":")
            self.frames[key] = [
                frame(t.ops[key[0]], file or NO_LINE, int(line or 0)),
                frame(t.modules[module] or "(root)" if module >= 0 else "(no module)", "module"),
                frame(f"{PHASES[phase]}, recomputed" if again else PHASES[phase], "phase"),
            ]
        return self.frames[key]

    def _before(self, module: str, name: str) -> Frames:
        key = (module, name)
        if key not in self.frames:
            self.frames[key] = [frame(name, NO_LINE), frame(module or "(root)", "module"), frame(BEFORE, "phase")]
        return self.frames[key]


def _by_event(of_storage: Any, events: int) -> dict[int, list[int]]:
    """Storages by the event at which something happens to them; what happens after the last one is left out."""
    found: dict[int, list[int]] = {}
    for k, i in enumerate(of_storage.tolist()):
        if i < events:
            found.setdefault(i, []).append(k)
    return found
