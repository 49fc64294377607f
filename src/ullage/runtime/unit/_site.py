"""What is remembered between the calls of one unit: facts about its state, and the logs that replays skip by."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

from ullage._errors import UllageWarning
from ullage.runtime.ambient._local import Apart
from ullage.runtime.ops._log import Log
from ullage.runtime.ops._select import Selection
from ullage.runtime.state._state import Changes
from ullage.runtime.state._warn_each_time import again
from ullage.runtime.tensors._notes import Notes, meta_of
from ullage.runtime.unit._place import Trail

if TYPE_CHECKING:
    from torch import Tensor

    from ullage.runtime.tensors._memory import Layout
    from ullage.runtime.unit._options import Options
    from ullage.runtime.unit._tier import Away, Tier

MOST_SIGNATURES = 64  # per unit structure; the one not used for longest goes first
MOST_STALE = 3


@dataclass(frozen=True)
class Facts:
    """What the first call of a unit showed.

    Attributes:
        changes: state it changes.
        host_rng: it draws from Python's or numpy's generator.
        must_keep: why it can't be run again, so that everything is kept, or "".
        looks: from how many calls: what the first one made may be changed by the second.
    """

    changes: Changes = field(default_factory=Changes)
    host_rng: bool = False
    must_keep: str = ""
    looks: int = 1


@dataclass
class Proof:
    """One replay has to give back, bit for bit, what its forward saved; one call at a time takes the digests for it."""

    done: bool = False
    by: ReferenceType[Any] | None = None

    def claim(self, frame: Any) -> bool:
        """Is it this call's to prove?"""
        if self.done or (self.by is not None and self.by() is not None):
            return False
        self.by = ref(frame)
        return True

    def belongs_to(self, frame: Any) -> bool:
        """Has this call claimed it?"""
        return self.by is not None and self.by() is frame


@dataclass
class Known:
    """A selection for one input signature, and whether a selective replay has proven it."""

    selection: Selection
    notes: Notes
    proof: Proof = field(default_factory=Proof)


@dataclass(frozen=True)
class Learnt:
    """What a unit's call taught: its op log, what it saved, and which unit it was."""

    log: Log
    notes: Notes
    name: str


@dataclass
class Shared:
    """What units of one structure share: selections by input signature, and how often each went stale.

    Attributes:
        known: selections by input signature.
        stale: how often each went stale.
        proof: of a full replay of this structure.
        logs: where the op logs go, if someone wants them; by input signature.
        distrust: why a full replay was not what its forward was, so that later calls keep their activations; or "".
    """

    known: OrderedDict[Hashable, Known] = field(default_factory=OrderedDict)
    stale: dict[Hashable, int] = field(default_factory=dict)
    proof: Proof = field(default_factory=Proof)
    logs: dict[Hashable, Learnt] | None = None
    distrust: str = ""

    def look_up(self, signature: Hashable) -> Known | None:
        """What is known for a signature."""
        found = self.known.get(signature)
        if found is not None:
            self.known.move_to_end(signature)
        return found

    def learn(self, signature: Hashable, selection: Selection, notes: Notes) -> Known:
        """Remember a selection; it is not trusted yet."""
        if self.stale.get(signature, 0) >= MOST_STALE:
            selection = refused("what it saves changes from call to call")
        known = self.known[signature] = Known(selection, notes)
        while len(self.known) > MOST_SIGNATURES:
            old, _ = self.known.popitem(last=False)
            self.stale.pop(old, None)
        return known

    def know(self, signature: Hashable, selection: Selection, notes: Notes) -> None:
        """Take a selection as proven."""
        self.known[signature] = Known(selection, notes, Proof(True))

    def forget(self, signature: Hashable) -> None:
        """It went stale: the next call with it makes a new log."""
        self.stale[signature] = self.stale.get(signature, 0) + 1
        self.known.pop(signature, None)


@dataclass
class Site(Apart):
    """One unit: its name, what is known of it, and what happened.

    Attributes:
        name: what messages call it.
        shared: what it shares with units of its structure.
        changing: ids of tensors that a plan knows to change; on fake tensors nothing else shows it.
        trail: what units of its model that are rebuilt together know of each other.
        tier: where saved tensors are offloaded to, if there is such a place.
        facts: by the `training` flags below it and the types of what it reaches.
        noted: what a full call last saved, by the same.
        links: how often its input was not held, but left to the unit before.
        replays: how often it was re-run.
        skipped: ops that selective replays did not run, in all.
        stale: how often a log was not of what ran.
        sent_bytes: bytes offloaded, in all.
        late: how often backward waited for what was on its way back.
        notes: what a user should know, each once.
        layout: how the parameters and buffers of its last call lay in memory.
        places: where they stood.
        fills: a kernel of it fills a tensor that is saved already, so that its replays run to their end.
        digests_last: digests of what it saves are taken when its forward is over.
        leaves: by where its replays stop: have they left something that its forward puts back later?
    """

    name: str
    shared: Shared = field(default_factory=Shared)
    changing: Callable[[], set[int]] | None = None
    trail: Trail | None = None
    tier: Tier | None = None
    facts: dict[Hashable, Facts] = field(default_factory=dict)
    noted: dict[Hashable, Notes] = field(default_factory=dict)
    links: int = 0
    replays: int = 0
    skipped: int = 0
    stale: int = 0
    sent_bytes: int = 0
    late: int = 0
    notes: dict[str, None] = field(default_factory=dict)
    layout: Layout | None = None
    places: Any = None  # a `Places` of `_reads`, which stands above
    fills: bool = False
    digests_last: bool = False
    leaves: dict[Hashable, bool] = field(default_factory=dict)

    def learns(self, options: Options) -> bool:
        """Will its next call be one that learns?"""
        return not self.facts or (options.rule is not None and not self.shared.known)

    def send(self, x: Tensor) -> Away | None:
        """Offload a saved tensor; None if it stays."""
        return self.tier.pack(x, self) if self.tier is not None else None

    def warn(self, note: str) -> None:
        """Note something, and warn of it at every call: results may be wrong each time."""
        self.notes[note] = None
        again(f"{self.name}: {note}")

    def say(self, note: str, warn: bool = True) -> None:
        """Note something that makes no result wrong; the first time as a warning too."""
        if note not in self.notes:
            self.notes[note] = None
            if warn:
                warnings.warn(f"{self.name}: {note}", UllageWarning, stacklevel=2)


def refused(reason: str) -> Selection:
    """Nothing is kept and nothing skipped."""
    return Selection(frozenset(), frozenset(), (), 0, reason)


def flags_of(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The flags among arguments: what state a forward changes often depends on them."""
    return tuple([a for a in (*args, *kwargs.values()) if a is None or isinstance(a, bool | str)])


def signature_of(args: Any, kwargs: Any, flags: Hashable, training: Hashable) -> Hashable:
    """What a log depends on: shapes, strides, dtypes and types of the arguments, flags around the call."""
    parts: list[Any] = [flags, training]
    for a in (*args, *kwargs.values()) if kwargs else args:
        if hasattr(a, "untyped_storage"):
            parts.append((type(a), *meta_of(a), a.requires_grad))
        elif a is None or isinstance(a, bool | int | float | str):
            parts.append(a)
        elif isinstance(a, list | tuple):
            parts.append((type(a), signature_of(a, {}, None, None)))
        elif isinstance(a, dict):
            parts.append((type(a), tuple(map(str, a)), signature_of(tuple(a.values()), {}, None, None)))
        else:
            parts.append(type(a))
    if kwargs:
        parts.append(tuple(kwargs))
    return tuple(parts)
