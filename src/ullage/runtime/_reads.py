"""What a call's forward could read besides its arguments, and what of that is no longer what it was when backward comes."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from ullage._array import has_memory
from ullage._errors import ReplayError
from ullage.runtime._collect import Modified
from ullage.runtime._digest import digest
from ullage.runtime._gathered import shards
from ullage.runtime._local import quiet
from ullage.runtime._reach import name_in
from ullage.runtime._state import State
from ullage.runtime._watch import storage_of

if TYPE_CHECKING:
    from ullage.runtime._frame import Frame

SMALL = 4096  # elements of a tensor that is copied on entry even if no call has changed it yet
_version = attrgetter("_version")


class Around:
    """A tensor that the unit closes over: what it was when the unit was called.

    Args:
        t: the tensor.
    """

    __slots__ = ("kind", "tensor", "values", "version")

    def __init__(self, t: Tensor) -> None:
        self.tensor, self.version = ref(t), t._version
        self.kind = (2 if t.is_leaf else 1) if t.requires_grad else 0
        with quiet(), torch.no_grad():
            self.values = _copy(t)

    def moved(self) -> Tensor | None:
        """The tensor, if it has been written to since."""
        t = self.tensor()
        return t if t is not None and t._version != self.version else None

    def written(self) -> Tensor | None:
        """Asked right after the forward: the tensor, if the forward wrote to it and writing that again would matter."""
        t = self.moved()
        if t is not None and self.kind == 0 and _same(t, self.values):
            self.version, t = t._version, None
        return t


def _copy(t: Tensor) -> Tensor | None:
    """None for a large one, and for what can't be copied."""
    try:
        return t.detach().clone() if t.numel() <= SMALL and has_memory(t) else None
    except (NotImplementedError, RuntimeError):
        return None


def _same(t: Tensor, values: Any) -> bool:
    """Was it written to and yet holds what it held? `values`: a copy of that, or None."""
    if not isinstance(values, Tensor):
        return False
    with quiet():
        found = digest(t)
        return found is not None and found == digest(values)


class Reads:
    """Which parameters and buffers there were when a forward was over, and their versions.

    Args:
        frame: the call; what its entry has a copy of is left out.
    """

    __slots__ = ("ids", "replaced", "versions")

    def __init__(self, frame: Frame) -> None:
        self.replaced = frame.entry.replaced() if frame.entry is not None else ()
        tensors = self._readable(frame)
        self.ids, self.versions = list(map(id, tensors)), list(map(_version, tensors))

    def _readable(self, frame: Frame) -> list[Tensor]:
        tensors = frame.reached.tensors(self.replaced)
        if frame.entry is None:
            return tensors
        noted = {id(o) for o, _ in frame.entry.values}
        return [t for t in tensors if id(t) not in noted]

    def changed(self, frame: Frame) -> dict[int, str]:
        """Names, by storage, of what is of another version now.

        Raises:
            ReplayError: one of them is another object.
        """
        tensors = self._readable(frame)
        if list(map(_version, tensors)) == self.versions and list(map(id, tensors)) == self.ids:
            return {}
        was = dict(zip(self.ids, self.versions, strict=True))
        known = tensors
        if list(map(id, tensors)) != self.ids:
            stand_ins = shards(frame.reached)
            known = [t if id(t) in was else stand_ins.get(id(t), t) for t in tensors]
        if list(map(id, known)) != self.ids:
            new = (name_in(frame.roots, t) for t, k in zip(tensors, known, strict=True) if id(k) not in was)
            raise changed_error(frame, next(new, "the set of its parameters"))
        changed = [t for t, k in zip(tensors, known, strict=True) if k._version != was[id(k)]]
        return {storage_of(t): name_in(frame.roots, t) for t in changed}


def changed_reads(frame: Frame) -> dict[int, str]:
    """What the unit can read and is not what the forward could: names by storage.

    Raises:
        ReplayError: a parameter is another object, or what the forward itself changed can't be put back.
    """
    if frame.unseen:
        raise ReplayError(
            f"{frame.site.name}: its forward changed {frame.unseen}, which its first call had left alone, so a replay would start from "
            "another value; later calls are prepared for it"
        )
    changed = frame.inputs.changed()
    if frame.reads is None:
        return changed
    more = frame.reads.changed(frame)
    if more or frame.watched or frame.around:
        return {**changed, **more, **_changed_copies(frame)}
    return changed


def _changed_copies(frame: Frame) -> dict[int, str]:
    """Of what was copied on entry and has changed since, the replay sees the copy; it must not be what is saved."""
    lost: dict[int, str] = {}
    restored = dict(frame.restored)
    for t, version in frame.watched:
        if t._version != version:
            restored[storage_of(t)] = name_in(frame.roots, t)
    for around in frame.around:
        moved = around.moved()
        if moved is None or _same(moved, around.values):
            continue
        (lost if around.values is None else restored)[storage_of(moved)] = name_in(frame.roots, moved)
        if around.values is not None:
            frame.entry = frame.entry if frame.entry is not None else State([], [], [])
            if all(o is not moved for o, _ in frame.entry.values):
                frame.entry.values.append((moved, around.values))
    frame.restored = restored
    return lost


def mark_restored(frame: Frame, store: dict[int, Any]) -> None:
    """What the replay saw as it was is not as it was any more: where it is itself what was saved, it can't be had."""
    for i, t in store.items():
        name = frame.restored.get(storage_of(t)) if isinstance(t, Tensor) else None
        if name is not None:
            store[i] = Modified(t.shape, name)


def changed_error(frame: Frame, name: str) -> ReplayError:
    """The error for a replay that reads something else than its forward did."""
    return ReplayError(
        f"{frame.site.name}: {name} was changed between forward and backward, so the replay would give other values; "
        "change it after backward, or leave this unit out of checkpointing"
    )
