"""Detect state besides the arguments (attributes, closures, tensors of globals) that changed between a forward and its replay."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from operator import attrgetter, is_
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ullage._errors import ReplayError
from ullage.runtime.ambient._local import quiet
from ullage.runtime.state._gathered import swapped
from ullage.runtime.state._reach import name_in
from ullage.runtime.state._state import State
from ullage.runtime.tensors._digest import digest
from ullage.runtime.tensors._memory import (
    Back,
    Memory,
    alias,
    fits_in,
    has_memory,
    kind_of,
    same_memory,
    storage_of,
    storages_of,
)
from ullage.runtime.unit._call import Call
from ullage.runtime.unit._modified import Modified

# Elements of a tensor that is copied on entry even if no call has changed it yet. Up to this size a copy costs what an op costs
# whatever its size (2 us on a CPU; 64 Ki elements take 24 us), and it is 32 KiB at most. Larger ones are only watched.
SMALL = 4096
_version = attrgetter("_version")


class Around:
    """A tensor that the unit closes over, as it was when the unit was called.

    Args:
        t: the tensor.
    """

    __slots__ = ("kind", "memory", "tensor", "values", "version")

    def __init__(self, t: Tensor) -> None:
        self.tensor, self.version = ref(t), t._version
        self.kind = kind_of(t)
        with quiet(), torch.no_grad():
            self.memory = alias(t)
            self.values = _copy(t)

    def moved(self) -> Tensor | None:
        """Return the tensor, if it has been written to since."""
        t = self.tensor()
        return t if t is not None and t._version != self.version else None

    def elsewhere(self) -> Tensor | None:
        """Return the tensor, if it has other memory now."""
        t = self.tensor()
        return t if t is not None and t.numel() and not same_memory(t, self.memory) else None

    def written(self) -> Tensor | None:
        """Return the tensor, if the forward wrote to it and a second such write would matter. Call it right after the forward."""
        t = self.moved()
        if t is not None and self.kind == 0 and _same(t, self.values):
            self.version, t = t._version, None
        return t


def _copy(t: Tensor) -> Tensor | None:
    """Copy a tensor; None for a large one, and for one that can't be copied."""
    try:
        if t.layout != torch.strided:  # its values are not in one memory: only versions tell of a change
            return None
        return t.detach().clone() if t.numel() <= SMALL and has_memory(t) else None
    except (NotImplementedError, RuntimeError):
        return None


def _same(t: Tensor, values: Any) -> bool:
    """Does a tensor that was written to hold its old values all the same? `values`: a copy of those, or None."""
    if not isinstance(values, Tensor):
        return False
    with quiet():
        found = digest(t)
        return found is not None and found == digest(values)


class Places:
    """Which keys of the dicts of parameters and buffers hold which tensors, in one call.

    It outlives the call, and so holds no tensor and no dict.

    Args:
        frame: the call.
        replaced: (id of a dict, key) pairs to leave out.
        ids: ids of the tensors in the dicts.

    Attributes:
        keys: per dict its keys, each with the index of its tensor; -1: None.
    """

    __slots__ = ("ids", "keys")

    def __init__(self, frame: Call, replaced: Container[tuple[int, str]], ids: list[int]) -> None:
        self.ids, self.keys = ids, list[dict[str, int]]()
        i = 0
        for d in frame.reached.dicts():
            keys: dict[str, int] = {}
            for key, t in d.items():
                if (id(d), key) not in replaced:
                    keys[key], i = (i, i + 1) if t is not None else (-1, i)
            self.keys.append(keys)

    def in_dicts(self, frame: Call) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
        """Yield the dicts, each with its keys."""
        return zip(frame.reached.dicts(), self.keys, strict=True)


class Reads:
    """The parameters and buffers at the end of a forward, with their versions and their memory.

    Args:
        frame: the call.

    Attributes:
        held: nothing had changed when `changed` was last called.
    """

    __slots__ = ("_places", "_tensors", "held", "ids", "memory", "replaced", "versions")

    def __init__(self, frame: Call) -> None:
        self.replaced = frame.entry.replaced() if frame.entry is not None else ()
        tensors: list[Any] = frame.reached.tensors(self.replaced)
        site, self.held = frame.site, False
        self.ids, self.versions = list(map(id, tensors)), list(map(_version, tensors))
        self.memory = Memory(tensors, site.layout)
        if site.places is None or site.places.ids != self.ids:
            site.places = Places(frame, self.replaced, self.ids)
        self._places, site.layout = site.places, self.memory.layout
        for i in site.layout.loose:  # a buffer that is written to later may hold the graph that holds this frame
            tensors[i] = ref(tensors[i])
        self._tensors: list[Any] = tensors

    def now(self, frame: Call) -> list[Tensor]:
        """Return the tensors that the dicts hold now."""
        return frame.reached.tensors(self.replaced)

    def hold(self, tensors: list[Tensor]) -> bool:
        """Are these the same tensors, with the same versions and the same memory?"""
        return (
            list(map(_version, tensors)) == self.versions
            and list(map(id, tensors)) == self.ids
            and self.memory.holds(tensors)
        )

    def _was(self, i: int) -> Tensor | None:
        t = self._tensors[i]
        return t() if type(t) is ReferenceType else t

    def changed(self, frame: Call, back: Back) -> dict[int, str]:
        """Return names, by storage, of tensors that a replay would read with other values than the forward.

        Replaced tensors and memory that can be put back are added to `back` instead.

        Raises:
            ReplayError: a tensor is gone.
        """
        self.held = self.hold(self.now(frame))
        if self.held:
            return {}
        entry = frame.entry
        copied = {id(o) for o, _ in entry.values} if entry is not None else ()
        # `entry` restores its own dicts whole; in FSDP's dicts FSDP itself puts what a forward needs
        apart = {id(o) for o, _ in entry.containers} if entry is not None else set()
        apart |= swapped(frame.reached)
        found: dict[int, str] = {}
        seen: set[int] = set()
        for d, keys in self._places.in_dicts(frame):
            if id(d) not in apart:
                self._note_content(frame, d, keys, back, found)
            for key, i in keys.items():
                t = self._was(i) if i >= 0 else None
                if t is None or id(t) in seen:
                    continue
                seen.add(id(t))
                if id(t) not in copied and t._version != self.versions[i]:
                    # the tensor that the replay will read: in FSDP's dicts, the one that FSDP has put there
                    read = d.get(key, t) if id(d) in apart else t
                    found[storage_of(read)] = self._name(frame, d, key, t)
                elif self.memory.has_moved(i, t):
                    before = self.memory.read(i)
                    if before is not None and fits_in(t, before):
                        back.memory.append((t, before))
                    else:
                        found[storage_of(t)] = self._name(frame, d, key, t)
        return found

    def _note_content(
        self, frame: Call, d: dict[str, Any], keys: dict[str, int], back: Back, found: dict[int, str]
    ) -> None:
        content: dict[str, Any] = {}
        for key, i in keys.items():
            content[key] = t = self._was(i) if i >= 0 else None
            if i >= 0 and t is None:  # it was replaced, and nobody holds the old one any more
                now = content[key] = d.get(key)
                if now is None:
                    raise changed_error(frame, key)
                found[storage_of(now)] = self._name(frame, d, key, now)
        if list(d) != list(content) or not all(map(is_, d.values(), content.values())):
            back.dicts.append((d, content))

    def put_back(self, frame: Call) -> list[str]:
        """After a replay, put back the tensors it replaced; return their names and those of tensors it has written to."""
        now = self.now(frame)
        if (
            list(map(_version, now)) == self.versions
            and list(map(id, now)) == self.ids
            and storages_of(now) == self.memory.storages
        ):
            return []
        names, apart = [], swapped(frame.reached)
        for d, keys in self._places.in_dicts(frame):
            for key, i in keys.items():
                t = self._was(i) if i >= 0 else None
                if t is None:
                    continue
                if id(d.get(key)) != id(t) and id(d) not in apart:
                    d[key] = t
                elif self.memory.has_moved(i, t):
                    self.memory.put_back(i, t)
                elif t._version == self.versions[i]:
                    continue
                names.append(name_in(frame.roots, t))
        return names

    @staticmethod
    def _name(frame: Call, d: dict[str, Any], key: str, t: Tensor) -> str:
        now = d.get(key)
        return name_in(frame.roots, now if now is not None else t)


class Before:
    """Parameters, buffers and closed-over tensors right before a replay, which must leave their memory alone.

    A unit that gives a parameter other memory at its first call is never replayed. One that does so first at a later call does it
    again in its replay, and if ops are skipped the new memory is a placeholder's: the next kernel would crash the process.

    Args:
        frame: the call.
    """

    __slots__ = ("_around", "_reads")

    def __init__(self, frame: Call) -> None:
        reads = frame.reads
        self._reads = reads if reads is None or reads.held else Reads(frame)
        with quiet():
            self._around = [(t, alias(t)) for a in frame.around if (t := a.tensor()) is not None]

    def put_back(self, frame: Call) -> str:
        """Put back what the replay has replaced; return the name of one such tensor, or of one that it has written to, or ""."""
        names = self._reads.put_back(frame) if self._reads is not None else []
        for t, data in self._around:
            if not same_memory(t, data):
                t.data = data
                names.append(name_in(frame.roots, t))
        return names[0] if names else ""


def changed_reads(frame: Call) -> dict[int, str]:
    """Return the tensors that a replay would read with other values than the forward: names by storage.

    Changes that can be undone for the replay are in `frame.back` instead.

    Raises:
        ReplayError: a tensor is gone, or the forward itself changed one whose old values nobody has.
    """
    if frame.unseen:
        raise ReplayError(
            f"{frame.site.name}: its forward changed {frame.unseen}, which its first call had left alone, so a replay would start from "
            "another value; later calls are prepared for it"
        )
    changed = frame.inputs.changed()
    frame.back = None
    if frame.reads is None:
        return changed
    back = Back()
    back.dicts += frame.reached.replaced()
    more = frame.reads.changed(frame, back)
    if more or frame.watched or frame.around or frame.around_written or frame.left:
        changed = {**changed, **more, **_changed_copies(frame, back)}
    if back:
        frame.back = back
    return changed


def _changed_copies(frame: Call, back: Back) -> dict[int, str]:
    """The replay reads the entry copy of a changed tensor, so that tensor itself must not be handed to backward."""
    lost: dict[int, str] = {}
    restored = dict(frame.restored)
    if frame.entry is not None:  # tensors that the forward itself changes, and that somebody has changed since
        for (o, _), version in zip(frame.entry.values, frame.left, strict=False):
            if version >= 0 and o._version != version:
                restored[storage_of(o)] = name_in(frame.roots, o)
    for t, version in frame.watched:
        if t._version != version:
            restored[storage_of(t)] = name_in(frame.roots, t)
    for around in (*frame.around, *frame.around_written):
        elsewhere = around.elsewhere()
        if elsewhere is not None and fits_in(elsewhere, around.memory):
            back.memory.append((elsewhere, around.memory))
        elif elsewhere is not None:
            lost[storage_of(elsewhere)] = name_in(frame.roots, elsewhere)
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


def mark_restored(restored: Mapping[int, str], store: dict[int, Any]) -> None:
    """Mark collected tensors that are restored inputs themselves: after the replay they have their new values again."""
    for i, t in store.items():
        name = restored.get(storage_of(t)) if isinstance(t, Tensor) else None
        if name is not None:
            store[i] = Modified(t.shape, name)


def changed_error(frame: Call, name: str, read: str = "") -> ReplayError:
    """Return the error for a replay that would read other values than its forward.

    Args:
        frame: the call.
        name: the tensor that changed.
        read: an op that reads on the host a value computed from it, if that is why the replay can't go on.
    """
    why = (
        f", and {read} reads a value that follows from it: what the unit does next may depend on that"
        if read
        else ", so the replay would give other values"
    )
    return ReplayError(
        f"{frame.site.name}: {name} was changed between forward and backward{why}; change it after backward, or leave this unit out of "
        "checkpointing"
    )
