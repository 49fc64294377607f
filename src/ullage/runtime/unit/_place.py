"""A unit's place in the runs of a plan (units that one sweep recomputes together), and the call of the unit before it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from ullage._torch import tree_flatten


@dataclass(frozen=True)
class Place:
    """A unit's place in the runs of a plan.

    Attributes:
        depth: number of runs that contain it and start with another unit; 0: it holds its input from forward on.
        item: depth of its neighbours in the innermost run that contains it: its own depth, unless it starts a run.
        records: a sweep of its own run keeps all its saved tensors, so it is not run again.
        feeds: the next unit does not hold its input: this unit's output is recomputed for it.
    """

    depth: int = 0
    item: int = 0
    records: bool = False
    feeds: bool = False


NOWHERE = Place()


class Trail(threading.local):
    """The last call in this thread of a unit whose output the next unit may leave unheld. One trail per model."""

    last: tuple[ReferenceType[Any], list[tuple[ReferenceType[Tensor], int] | None]] | None = None

    def note(self, frame: Any, out: Any) -> None:
        """Note that a call is over and returned `out`."""
        self.last = None
        # without `reads` the call keeps everything or saves nothing: it can't be run again for its output
        if frame.complete and frame.reads is not None:
            leaves = tree_flatten(out)[0]
            self.last = ref(frame), [(ref(t), t._version) if isinstance(t, Tensor) else None for t in leaves]

    def take(self) -> tuple[Any, dict[int, int]] | None:
        """Return the call before and, by id, which leaf of its output each living and unchanged tensor is."""
        last, self.last = self.last, None
        frame = last[0]() if last is not None else None
        if last is None or frame is None:
            return None
        found = {}
        for leaf, noted in enumerate(last[1]):
            t = noted[0]() if noted is not None else None
            if noted is not None and t is not None and t._version == noted[1]:
                found[id(t)] = leaf
        return frame, found
