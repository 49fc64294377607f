"""Put back what a replay that stops early leaves changed, because a forward often restores state only near its end.

The attributes of modules are compared at every replay. Everything else that a unit reaches (containers, plain objects, slots, cells,
globals, class attributes, hooks, arrays) is compared at the first replay that stops at a given tensor, and at later ones only
if that first one left something changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np

from ullage.runtime.state._content import content_of, put_content, same_content
from ullage.runtime.state._reach import Reached
from ullage.runtime.state._traverse import all_places, traverse, with_classes
from ullage.runtime.state._walk import is_part
from ullage.runtime.unit._call import Call

if TYPE_CHECKING:
    from ullage.runtime.replay._collect import Collector

_MOST_PLACES = 256  # stops remembered per unit; beyond, all are forgotten and each is compared once more. Not tuned


class Attributes:
    """The attributes of all modules that a call reaches, before a replay.

    Args:
        reached: what the call reaches.
    """

    __slots__ = ("_noted",)

    def __init__(self, reached: Reached) -> None:
        modules = [m for below in reached.below for r in below.modules if (m := r()) is not None]
        self._noted = [(d, list(d), list(d.values())) for d in [m.__dict__ for m in modules]]

    def put_back(self) -> None:
        """Put back attributes that are other objects now."""
        for d, keys, values in self._noted:
            if list(d) != keys or not all(map(is_, d.values(), values)):
                _put(d, dict(zip(keys, values, strict=True)))


def _put(fields: dict[str, Any], was: dict[str, Any]) -> None:
    for key in [k for k in fields if k not in was]:
        del fields[key]
    if list(fields) != list(was):  # the order is content, too
        fields.clear()
    fields.update(was)


class Everything:
    """The content of every place that a call reaches, before a replay.

    Args:
        roots: where the walk starts.
    """

    __slots__ = ("_arrays", "_places")

    def __init__(self, roots: Sequence[Any]) -> None:
        self._places: list[tuple[Any, Any]] = []
        self._arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        seen = dict[int, Any]()
        for obj, _ in traverse(roots, seen, with_classes, classes=True):
            if isinstance(obj, np.ndarray):
                self._arrays.append((obj, obj.copy()))
            elif not is_part(obj):
                for place in all_places(obj):
                    if place is obj or id(place) not in seen:
                        seen[id(place)] = place
                        self._places.append((place, content_of(place)))

    def put_back(self) -> bool:
        """Put back each place whose content changed; return whether there was any."""
        places = [(p, c) for p, c in self._places if not same_content(c, content_of(p))]
        arrays = [(a, was) for a, was in self._arrays if a.tobytes() != was.tobytes()]
        for place, content in places:
            put_content(place, content)
        for array, was in arrays:
            array[...] = was
        return bool(places or arrays)


class Left:
    """State that one replay may leave changed: noted before the replay, put back after it.

    Args:
        frame: the call.
        replay: its collector, which knows where it stops.
    """

    __slots__ = ("_attributes", "_everything", "_key", "_site")

    def __init__(self, frame: Call, replay: Collector) -> None:
        self._attributes, self._site = Attributes(frame.reached), frame.site
        self._key: Hashable = None
        self._everything: Everything | None = None
        if replay.stops:
            selection = replay.selection
            self._key = (frame.kinds, replay.total, selection.kept if selection is not None else None)
            if self._site.leaves.get(self._key, True):
                self._everything = Everything(frame.roots)

    def put_back(self, ended: bool) -> None:
        """Put all of it back, and note whether the next replay with the same stop has to compare everything again.

        Args:
            ended: the replay got to its stop. One that failed before says nothing of what is changed there.
        """
        self._attributes.put_back()
        if self._everything is None:
            return
        changed = self._everything.put_back()
        if ended or changed:
            leaves = self._site.leaves
            if len(leaves) >= _MOST_PLACES:
                leaves.clear()
            leaves[self._key] = changed
