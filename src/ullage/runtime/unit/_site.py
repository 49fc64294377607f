"""What the calls of one unit teach later ones: which state it changes, what it saves, and which ops a replay may skip.

Idea: a first call is slow and looks at everything; later calls of the same kind rely on what it found and only verify. A unit's
`Site` holds this for one module; units of equal structure share the expensive part in one `Shared`.

Invariant: nothing learnt is believed unseen. A forward compares each saved tensor with the notes, a replay compares again, and
the first replay of a kind must reproduce the digests of what its forward dropped (`Proof`). What fails is forgotten or refused.

    name                lifetime                       written by                    read by
    Site.facts          site, per kinds of a call      learn, frame, replay          frame (on entry)
    Site.noted          site, per kinds of a call      learn, frame (at the end)     frame: what a full call is expected to save
    Shared.known        structure, per signature       learn; a plan (`know`)        frame (on entry), as `frame.known`
    Shared.logs         structure, per signature       learn, as `Learnt`            the planner's levels; None outside a capture
    Known.notes         as long as its Known           learn                         pack hooks of forward
    Known.proof,
    Shared.proof        structure                      frame (claims), replay (done) frame, learn, replay
    Site.notes          site                           say, warn                     handles and reports: texts for the user
    frame.known         one call                       frame, learn                  pack hooks, replay
    frame.notes         one call                       learn, frame (at the end)     replay: what it must save again

A call's kinds are the `training` flags, structures, flags, gradient kinds and types of the objects it reaches; its signature adds shapes,
strides, dtypes and the flags around the call.

Known non-optimalities: a first call holds all its saved tensors, so it saves no memory. One digest mismatch of a full replay
makes the whole structure keep its activations (`distrust`), even if only one of its units draws unseen numbers.
"""

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

# Per unit structure; the least recently used one is dropped. A log has an entry per op, and a program whose shapes never repeat
# (each batch padded to its own length) would keep one more log per step. Not tuned.
MOST_SIGNATURES = 64
# Logs of one signature that may go stale before its replays run in full. A branch that depends on data makes each new log wrong
# again, and each costs a slow first call; a one-time change (a lazily built cache) costs one or two. Not tuned.
MOST_STALE = 3


@dataclass(frozen=True)
class Facts:
    """What the first calls of a unit showed.

    Attributes:
        changes: state that its forward changes.
        host_rng: its forward draws from Python's or numpy's generator.
        must_keep: why its forward can't be run again, so that all its saved tensors are kept; or "".
        looks: number of calls that were looked at. A forward that changes containers needs two: the second call may change
            an object that the first one only created (a cache that is filled, then appended to).
    """

    changes: Changes = field(default_factory=Changes)
    host_rng: bool = False
    must_keep: str = ""
    looks: int = 1


@dataclass
class Proof:
    """Whether a replay has reproduced its forward's saved tensors bit for bit.

    One call at a time takes the digests for it, because a digest reads every byte that the call drops.
    """

    done: bool = False
    by: ReferenceType[Any] | None = None

    def claim(self, frame: Any) -> bool:
        """Let this call take the digests, unless the proof is done or another living call has claimed it."""
        if self.done or (self.by is not None and self.by() is not None):
            return False
        self.by = ref(frame)
        return True

    def belongs_to(self, frame: Any) -> bool:
        """Has this call claimed it?"""
        return self.by is not None and self.by() is frame


@dataclass
class Known:
    """A selection for one input signature, the notes of the call it was learnt from, and whether a selective replay has proven it."""

    selection: Selection
    notes: Notes
    proof: Proof = field(default_factory=Proof)


@dataclass(frozen=True)
class Learnt:
    """One recorded call of a unit: its op log, the notes of its saved tensors, and the unit's name."""

    log: Log
    notes: Notes
    name: str


@dataclass
class Shared:
    """What units of one structure share.

    Attributes:
        known: selections by input signature.
        stale: by input signature, how many logs went stale.
        proof: whether a full replay of this structure is proven.
        logs: gets the op logs by input signature, if a capture asks for them.
        distrust: how a full replay differed from its forward, so that later calls keep their activations; or "".
    """

    known: OrderedDict[Hashable, Known] = field(default_factory=OrderedDict)
    stale: dict[Hashable, int] = field(default_factory=dict)
    proof: Proof = field(default_factory=Proof)
    logs: dict[Hashable, Learnt] | None = None
    distrust: str = ""

    def look_up(self, signature: Hashable) -> Known | None:
        """Return what is known for a signature, or None."""
        found = self.known.get(signature)
        if found is not None:
            self.known.move_to_end(signature)
        return found

    def learn(self, signature: Hashable, selection: Selection, notes: Notes) -> Known:
        """Remember a selection that no replay has proven yet."""
        if self.stale.get(signature, 0) >= MOST_STALE:
            selection = refused("what it saves changes from call to call")
        known = self.known[signature] = Known(selection, notes)
        while len(self.known) > MOST_SIGNATURES:
            old, _ = self.known.popitem(last=False)
            self.stale.pop(old, None)
        return known

    def know(self, signature: Hashable, selection: Selection, notes: Notes) -> None:
        """Remember a selection that is already proven."""
        self.known[signature] = Known(selection, notes, Proof(True))

    def forget(self, signature: Hashable) -> None:
        """Drop a selection whose log went stale: the next call with this signature records a new log."""
        self.stale[signature] = self.stale.get(signature, 0) + 1
        self.known.pop(signature, None)


@dataclass
class Site(Apart):
    """One unit: its name, what its calls taught, and counts of what happened.

    Attributes:
        name: its name in messages.
        shared: what it shares with units of its structure.
        changing: ids of tensors that a plan knows to change; a call on fake tensors shows no values and can't tell.
        trail: the last call of the previous unit, for units that one sweep recomputes together.
        tier: where saved tensors are offloaded to, if anywhere.
        facts: facts by the kinds of a call.
        noted: notes of the last full call, by the kinds of a call.
        links: number of calls whose input was not held but left to the previous unit.
        replays: number of replays.
        skipped: ops that selective replays did not run, in all.
        stale: number of op logs that did not match what ran.
        sent_bytes: bytes offloaded, in all.
        late: how often backward waited for a tensor on its way back.
        notes: texts for the user, each once.
        layout: how the parameters and buffers of its last call lay in memory.
        places: which dicts held them.
        fills: one of its kernels fills a tensor after autograd saved it, so its replays run to their end.
        digests_last: digests of its saved tensors are taken when its forward is over, for the same reason.
        leaves: by the tensor at which a replay stops: has such a replay left something changed that the rest of the forward
            would have put back?
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
        """Will the next call learn, and so hold all its saved tensors until its forward is over?"""
        return not self.facts or (options.rule is not None and not self.shared.known)

    def send(self, x: Tensor) -> Away | None:
        """Offload a saved tensor; None if it stays in memory."""
        return self.tier.pack(x, self) if self.tier is not None else None

    def warn(self, note: str) -> None:
        """Note a text and warn with it at every call, because results may be wrong each time."""
        self.notes[note] = None
        again(f"{self.name}: {note}")

    def say(self, note: str, warn: bool = True) -> None:
        """Note a text about something that makes no result wrong; the first time it is a warning too."""
        if note not in self.notes:
            self.notes[note] = None
            if warn:
                warnings.warn(f"{self.name}: {note}", UllageWarning, stacklevel=2)


def refused(reason: str) -> Selection:
    """Return a selection that keeps nothing and skips nothing, with its reason."""
    return Selection(frozenset(), frozenset(), (), 0, reason)


def flags_of(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return the flags among the arguments: which state a forward changes often depends on them."""
    return tuple([a for a in (*args, *kwargs.values()) if a is None or isinstance(a, bool | str)])


def signature_of(args: Any, kwargs: Any, flags: Hashable, training: Hashable) -> Hashable:
    """Return what an op log depends on: shapes, strides, dtypes and types of the arguments, and flags around the call."""
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
