"""Everything that a step can change, as it was found: values in host memory and the content of every place, to be put back."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ullage._errors import UllageWarning
from ullage.measure._reach import all_a_step_reaches, copied_with
from ullage.measure._tensors import Homes, TensorState, is_fixed
from ullage.runtime.state._content import PLAIN, Slots, View, content_of, put_content, put_random_state, random_state
from ullage.runtime.state._traverse import all_places
from ullage.runtime.state._walk import RANDOM
from ullage.workload import Instance


class _Tuple:
    """Stands for a tuple with tensors: a tuple can't be emptied, so its items are noted instead."""

    __slots__ = ("items", "kind")

    def __init__(self, kind: type, items: list[Any]) -> None:
        self.kind, self.items = kind, items


class _Notes:
    """Contents in which tensors stand as their states, so that a snapshot holds none."""

    def __init__(self, states: dict[int, TensorState]) -> None:
        self._states, self._tuples = states, dict[int, Any]()

    def of(self, content: Any) -> Any:
        """A dict's, a set's or a list's content in that form."""
        if isinstance(content, dict):
            return {self._noted(k): self._noted(v) for k, v in content.items()}
        return type(content)(self._noted(v) for v in content)

    def _noted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._states.get(id(value), value)
        kind = type(value)
        if not isinstance(value, tuple) or (kind is not tuple and not hasattr(kind, "_make")):
            return value
        if id(value) not in self._tuples:
            items = [self._noted(v) for v in value]
            changed = any(a is not b for a, b in zip(items, value, strict=True))
            self._tuples[id(value)] = _Tuple(kind, items) if changed else value
        return self._tuples[id(value)]


def _is(noted: Any, value: Any) -> bool:
    if isinstance(noted, TensorState):
        return noted.is_(value)
    if isinstance(noted, _Tuple):
        return type(value) is noted.kind and _same(noted.items, value)
    return noted is value or (type(noted) is type(value) and isinstance(noted, PLAIN) and noted == value)


def _same(noted: Any, now: Any) -> bool:
    """Whether that is the noted content."""
    if len(noted) != len(now):
        return False
    if isinstance(now, dict):
        return all(map(_is, noted, now)) and all(map(_is, noted.values(), now.values()))
    if isinstance(now, set):
        return bool(_found_in(noted) == now)
    return all(map(_is, noted, now))


def _found(noted: Any) -> Any:
    """The object that a note stands for."""
    if isinstance(noted, TensorState):
        return noted.tensor()
    if isinstance(noted, _Tuple):
        items = [_found(v) for v in noted.items]
        return tuple(items) if noted.kind is tuple else noted.kind._make(items)  # type: ignore[attr-defined]
    return noted


def _found_in(content: Any, now: Any = ()) -> Any:
    """The noted content; parts that are still there stay the same objects."""
    if isinstance(content, dict):
        known = now if isinstance(now, dict) else {}
        pairs = [(_found(k), v) for k, v in content.items()]
        return {k: known[k] if k in known and _is(v, known[k]) else _found(v) for k, v in pairs}
    if isinstance(content, list) and isinstance(now, list):
        return [n if _is(v, n) else _found(v) for v, n in zip_longest(content, now[: len(content)])]
    return type(content)(_found(v) for v in content)


class Snapshot:
    """Tensors, gradients, contents of all places, arrays and generators that a step of an instance can change.

    Args:
        inst: the instance.
    """

    def __init__(self, inst: Instance) -> None:
        found = list(all_a_step_reaches(inst))
        tensors = [obj for obj in found if isinstance(obj, Tensor)]
        arrays = [obj for obj in found if isinstance(obj, np.ndarray) and obj.flags.writeable]
        left_out = _too_much([*tensors, *arrays], inst)
        homes = Homes()
        states = {id(t): TensorState(t, homes, id(t) not in left_out) for t in tensors}
        self._tensors = list(states.values())
        self._left_out = [states[id(t)] for t in tensors if id(t) in left_out]
        self._arrays = [(a, a.copy()) for a in arrays if id(a) not in left_out]
        self._generators = [(g, random_state(g)) for g in found if isinstance(g, RANDOM)]
        notes, seen = _Notes(states), set[int]()
        self._places: list[tuple[Any, Any, Any]] = []  # owner, place, its old content
        for obj in found:
            for place in [vars(obj)] if isinstance(obj, Tensor) else all_places(obj):
                if id(place) not in seen:
                    seen.add(id(place))
                    owner = place if isinstance(obj, Tensor) else obj
                    self._places.append((owner, place, notes.of(content_of(place))))

    @property
    def grads(self) -> list[Tensor]:
        """The gradients that existed at the snapshot."""
        return [t.grad for t in self._tensors if t.grad is not None]

    def set_gradients_aside(self) -> None:
        """Set gradients to None, as steps start without any; `restore` brings them back."""
        for state in self._tensors:
            if state.is_leaf:
                state.tensor().grad = None

    def let_go(self) -> None:
        """After a step, empty containers that the step has replaced and that only this snapshot holds; `restore` refills them.

        `GradScaler.update` gives the scaler a new dictionary, for example, and the plain step would have freed the tensors in the old one.
        """
        ours = Counter(id(part) for entry in self._places for part in entry[:2])
        ours.update(id(place.owner) for _, place, _ in self._places if isinstance(place, View))
        for _, _, was in self._places:
            ours.update(map(id, was.values() if isinstance(was, dict) else was))
        for entry in self._places:
            # a function's variables may be another's too
            shared = isinstance(entry[1], View) and not isinstance(entry[1], Slots)
            if not shared and sys.getrefcount(entry[0]) == ours[id(entry[0])] + 1:  # the call's argument
                put_content(entry[1], type(entry[2])())

    def restore(self) -> None:
        """Put everything back, in place."""
        for _, place, was in self._places:
            now = content_of(place)
            if not _same(was, now):
                put_content(place, _found_in(was, now))
        with torch.no_grad():
            for state in self._tensors:
                state.restore()
        for array, values in self._arrays:
            if array.shape != values.shape or array.tobytes() != values.tobytes():
                array[...] = values
        for generator, random in self._generators:
            put_random_state(generator, random)
        written = [state.tensor() for state in self._left_out if state.written()]
        if written:
            shapes = ", ".join(str(tuple(t.shape)) for t in written[:3])
            warnings.warn(
                f"the step writes to {len(written)} tensors outside model, optimizer and batch for whose copies there was no memory "
                f"(shapes {shapes}); they are not as they were before",
                UllageWarning,
                stacklevel=2,
            )


def _too_much(things: Iterable[Any], inst: Instance) -> set[int]:
    """Ids of the largest tensors outside of model, optimizer and batch, if copies of all do not fit in memory."""
    sizes = {id(x): x.nbytes for x in things if not isinstance(x, Tensor) or not is_fixed(x)}
    room = available_bytes()
    if room is None or sum(sizes.values()) <= room // 2:
        return set()
    own = {id(x) for x in copied_with(Instance(inst.model, inst.batch, None, inst.optimizer, None, 1, None))}
    left = room // 2 - sum(n for x, n in sizes.items() if x in own)
    found = set()
    for x, n in sorted(sizes.items(), key=lambda item: item[1]):
        if x not in own:
            left -= n
            if left < 0:
                found.add(x)
    return found


def available_bytes() -> int | None:
    """Memory of the host that can be had, if the kernel says it."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    return None
