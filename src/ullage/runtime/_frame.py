"""One call of a unit: what its forward leaves behind, and how backward asks for it.

A frame lives as long as autograd holds one of the unit's saved tensors. What autograd packs is an index; `_missing` gives the
tensor back from what was kept, from what was rebuilt, or after a replay. The pack hooks are closures over plain lists and dicts:
they run once per saved tensor, which makes them the hottest code there is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ullage._errors import ReplayError
from ullage.runtime import _ambient as ambient
from ullage.runtime._collect import Modified
from ullage.runtime._debug import OpNames
from ullage.runtime._digest import digest
from ullage.runtime._inputs import Inputs
from ullage.runtime._keep import Rule
from ullage.runtime._local import local, pop_hooks, push_hooks, quiet
from ullage.runtime._log import Meta
from ullage.runtime._reach import buffers_in, name_in, objects_in, roots_of, tensors_around, tensors_in, training_flags
from ullage.runtime._replay import rebuild
from ullage.runtime._site import Facts, Known, Site, flags_of, signature_of
from ullage.runtime._state import State, Unreachable, describe
from ullage.runtime._watch import storage_of

_SMALL = 4096  # elements of a buffer that is copied on entry even if no call has changed it yet
_graph_task = torch._C._current_graph_task_id
_group = getattr(torch._C, "_get_graph_exec_group", lambda: None)
_at_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback

Pack = Callable[[Tensor], int]


@dataclass(frozen=True)
class Options:
    """How a unit is run; see `ullage.checkpoint`."""

    rule: Rule | None = None
    preserve_rng_state: bool = True
    determinism_check: str = "default"
    early_stop: bool = True
    context_fn: Callable[[], tuple[Any, Any]] | None = None
    debug: bool = False
    host_rng: bool = False


class _Around:
    """A tensor that the unit closes over: what it was when the unit was called.

    Args:
        t: the tensor.
    """

    __slots__ = ("kind", "tensor", "values", "version")

    def __init__(self, t: Tensor) -> None:
        self.tensor, self.version = ref(t), t._version
        self.kind = (2 if t.is_leaf else 1) if t.requires_grad else 0
        with quiet(), torch.no_grad():
            self.values = t.detach().clone() if t.numel() <= _SMALL else None

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


def _same(t: Tensor, values: Any) -> bool:
    """Was it written to and yet holds what it held? `values`: a copy of that, or None."""
    if not isinstance(values, Tensor):
        return False
    with quiet():
        found = digest(t)
        return found is not None and found == digest(values)


class Frame:
    """See the module's docstring.

    Args:
        site: what is known of the unit.
        options: how to run it.
        fn: the unit's plain forward.
        args: positional arguments.
        kwargs: keyword arguments.
        on_replay: called at the start of every replay.
    """

    __slots__ = (
        "__weakref__",
        "around",
        "complete",
        "contexts",
        "digests",
        "entry",
        "flags",
        "held",
        "fn",
        "inputs",
        "kept",
        "kinds",
        "known",
        "notes",
        "on_replay",
        "ops",
        "options",
        "reads",
        "rebuilt",
        "replaced",
        "restored",
        "rng",
        "roots",
        "signature",
        "site",
        "stale",
        "unseen",
        "watched",
    )  # fmt: skip

    def __init__(
        self,
        site: Site,
        options: Options,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_replay: Callable[[], None] | None = None,
    ) -> None:
        self.site, self.options, self.fn, self.on_replay = site, options, fn, on_replay
        self.notes: list[Meta] = []
        self.kept: dict[int, tuple[Tensor, int]] = {}
        self.held: dict[int, Tensor | None] = {}  # of these, arguments of units in this one; copies where there is no replay
        self.rebuilt: dict[int, Any] = {}
        self.complete = self.stale = False
        self.digests: dict[int, bytes | None] | None = {} if options.determinism_check == "values" else None
        self.known: Known | None = None
        self.entry: State | None = None
        self.contexts: tuple[Any, Any] | None = None
        self.ops: list[str] | None = [] if options.debug else None
        self.signature: Hashable = None
        self.kinds: Hashable = None
        self.reads: tuple[list[int], list[int]] = ([], [])
        self.unseen = ""
        self.watched: list[tuple[Tensor, int]] = []
        self.restored: dict[int, str] = {}
        self.replaced: set[tuple[int, str]] = set()
        self.flags = ambient.read_flags()
        self.roots = roots_of(fn) + objects_in(args, kwargs)
        self.around = [_Around(t) for t in tensors_around(self.roots)]
        before, local.quiet = local.quiet, True
        try:
            self.inputs = Inputs(args, kwargs)
        finally:
            local.quiet = before
        self.rng = [(s, s[0]()) for s in ambient.sources_for(args)] if options.preserve_rng_state else []

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the unit's forward."""
        # in the selective replay of an outer unit nobody asks for what is saved here: nothing is learnt
        if local.skipping:
            return self.run(args, kwargs, self.packer([]))
        options = self.options
        training = training_flags(self.roots)
        grads = (*self.inputs.kinds(), *[a.kind for a in self.around])
        kinds = self.kinds = (training, flags_of(args, kwargs), grads, *map(type, self.roots))
        facts = self.site.facts.get(kinds)
        selective = options.rule is not None and options.context_fn is None
        if selective:
            self.signature = signature_of(args, kwargs, self.flags, training)
            if isinstance(self.fn, functools.partial):
                self.signature = (self.signature, signature_of(self.fn.args, self.fn.keywords, None, None))
            self.known = self.site.shared.look_up(self.signature)
        if facts is not None:
            if facts.must_keep:  # kept by this frame, as in the first call: an outer unit must see the same in both
                out = self.run(args, kwargs, self.packer_of_all())
                self.keep_all()
                return out
            if not (facts.looks > 1 or not facts.changes.containers) or not self._note_entry(facts):
                facts = None
        if facts is None or (selective and self.known is None):
            from ullage.runtime._learn import learn  # which runs frames; not on the hot path

            return learn(self, args, kwargs, facts)
        known = self.known
        proof = known.proof if known is not None else self.site.shared.proof
        if proof.claim(self) and self.digests is None:
            self.digests = {}
        expected = self.site.noted.get(kinds, []) if known is None else known.notes
        out = self.run(args, kwargs, self.packer(expected, known.selection.kept if known is not None else ()))
        self.finish(expected)
        if known is None and self.notes is not expected:
            self.site.noted[kinds] = self.notes
        return out

    def _note_entry(self, facts: Facts) -> bool:
        """Copy the state that the forward will change; False if it is not where it was."""
        changes = facts.changes
        if changes.containers or changes.values or changes.generators:
            try:
                with quiet():
                    self.entry = State.read(self.roots, changes)
            except Unreachable:
                return False
        buffers = buffers_in(self.roots)
        if buffers:
            self.note_buffers(buffers)
        if facts.host_rng or self.options.host_rng:
            self.rng.append((ambient.HOST, ambient.HOST[0]()))
        return True

    def note_buffers(self, buffers: list[Tensor]) -> None:
        """Buffers that no call has changed so far: small ones are copied all the same, others watched."""
        entry = self.entry if self.entry is not None else State([], [], [])
        known = {id(o) for o, _ in entry.values}
        self.watched = [(t, t._version) for t in buffers if id(t) not in known]
        with quiet():
            entry.values += [(t, t.detach().clone()) for t, _ in self.watched if t.numel() <= _SMALL]
        if entry.values:
            self.entry = entry

    def _look_for_unseen(self) -> None:
        """Note what this forward has changed though the call that was learnt from had not: there is no copy of what it was."""
        watched, self.watched = self.watched, []
        if watched:
            self.watched = [(t, v) for t, v in watched if t._version == v and t.numel() <= _SMALL]
            large = [t for t, version in watched if t._version != version and t.numel() > _SMALL]
            if large:
                self.unseen = name_in(self.roots, large[0])
                self.site.facts.clear()  # the next call learns
        argument = self.inputs.written()
        if not argument and self.around:
            written = self.entry.written() if self.entry is not None else ()
            self.around = [a for a in self.around if id(a.tensor()) not in written]
            argument = next((name_in(self.roots, t) for a in self.around if (t := a.written()) is not None), "")
        if argument:
            self.unseen = self.unseen or argument
            must_keep = f"some of its forwards write {argument} in place, so a replay would start from other values"
            self.site.facts[self.kinds] = Facts(must_keep=must_keep)
            self.site.say(f"{must_keep}; its activations are kept", warn=False)

    def keep_all(self) -> None:
        """There will be no replay. What only a replay needs may hold the graph that holds this frame."""
        self.complete = True
        self.inputs, self.roots, self.entry, self.rng, self.around = Inputs((), {}), [], None, [], []

    def packer(self, expected: list[Meta], keep: Any = ()) -> Pack:
        """The pack hook of a forward: note each saved tensor, keep those in `keep`, digest the others if asked to.

        A note that an earlier call made too is shared with it, so that a call leaves nothing new behind.
        """
        notes, kept, held, digests = self.notes, self.kept, self.held, self.digests
        note, known = notes.append, len(expected)

        def pack(x: Tensor) -> int:
            i = len(notes)
            meta = (x.shape, x.stride(), x.dtype, x.device)
            note(expected[i] if i < known and meta == expected[i] else meta)
            return i

        def pack_some(x: Tensor) -> int:
            i = pack(x)
            if i in keep:
                before, local.quiet = local.quiet, True
                try:
                    # detached: a node that saves its own output must not hold itself
                    kept[i] = (x.detach(), x._version)
                finally:
                    local.quiet = before
                if local.holding:
                    held[i] = None
            elif digests is not None:
                with quiet():
                    digests[i] = digest(x)
            return i

        return pack_some if keep or digests is not None else pack

    def packer_of_all(self, saved: Callable[[Tensor], None] | None = None) -> Pack:
        """A pack hook that keeps everything; `saved` is called with each tensor."""
        pack, kept, held = self.packer([]), self.kept, self.held

        def pack_all(x: Tensor) -> int:
            i = pack(x)
            with quiet():
                kept[i] = (x.detach(), x._version)
                if local.holding:
                    held[i] = x.detach().clone()
            if saved is not None:
                saved(x)
            return i

        return pack_all

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], pack: Pack) -> Any:
        """Call the unit under a pack hook."""
        if self.options.context_fn is not None:
            self.contexts = self.options.context_fn()
        push_hooks(pack, self.unpacker())
        try:
            if self.contexts is None and self.ops is None:
                return self.fn(*args, **kwargs)
            with contextlib.ExitStack() as stack:
                if self.contexts is not None:
                    stack.enter_context(self.contexts[0])
                if self.ops is not None:
                    stack.enter_context(OpNames(self.ops))
                return self.fn(*args, **kwargs)
        finally:
            pop_hooks()

    def finish(self, expected: list[Meta]) -> None:
        """After a forward that went well: generators nobody drew from go, versions of what it read are noted."""
        self.complete = True
        self._look_for_unseen()
        notes = self.notes
        if not notes:
            return
        if notes == expected:
            self.notes = expected
        elif self.known is not None:
            self.stale = not self.known.selection.refusal
        self.rng = [(s, state) for s, state in self.rng if not ambient.same_state(state, s[0]())]
        if self.entry is not None:
            self.replaced = self.entry.replaced()
        self.reads = self._versions()

    def _readable(self) -> list[Tensor]:
        """Parameters, buffers and held tensors of which no copy was taken on entry."""
        tensors = tensors_in(self.roots, self.replaced)
        if self.entry is None:
            return tensors
        noted = {id(o) for o, _ in self.entry.values}
        return [t for t in tensors if id(t) not in noted]

    def _versions(self) -> tuple[list[int], list[int]]:
        tensors = self._readable()
        return list(map(id, tensors)), [t._version for t in tensors]

    # --- backward ----------------------------------------------------------------------------------------------------

    def unpacker(self) -> Callable[[int], Tensor]:
        """The unpack hook. ReplayError if it can't give what the forward saved."""
        rebuilt = self.rebuilt.pop

        def unpack(i: int) -> Tensor:
            found = rebuilt(i, None)
            if found is None:
                found = self._missing(i)
            return found if type(found) is not Modified else self._modified(i, found)  # type: ignore[no-any-return]

        return unpack

    def _modified(self, i: int, found: Modified) -> Any:
        if found.by:
            raise self.changed_error(found.by)
        raise ReplayError(
            f"{self.site.name}: saved tensor {i} of shape {tuple(found.shape)} is modified by an inplace operation "
            "after it was saved, inside the unit; the plain step would fail too, unless it is the argument of a unit in this one"
        )

    def _missing(self, i: int) -> Any:
        kept = self.kept.get(i)
        if kept is not None and kept[0]._version != kept[1] and i in self.held:
            # the plain step does not save it, so there it may change
            if self.held[i] is not None:
                return self.held[i]
            del self.kept[i]
            self.known = kept = None
        if kept is not None:
            tensor, version = kept
            if tensor._version != version:
                raise ReplayError(
                    f"{self.site.name}: saved tensor {i} of shape {tuple(tensor.shape)} was modified by an inplace operation "
                    f"after the forward saved it (version {tensor._version}, expected {version}); the plain step would fail too"
                )
            return tensor
        store = rebuild(self)
        found = store.pop(i)
        if store and _graph_task() != -1:
            self.rebuilt.update(store)
            if _group() is None:
                # weakly: a unit's inputs go when its last node has run, not when the whole backward is over
                _at_end_of_backward(functools.partial(_let_go, ref(self)))
        return found

    def changed_reads(self) -> dict[int, str]:
        """What the unit can read and is not what the forward could: names by storage.

        Raises:
            ReplayError: a parameter is another object, or what the forward itself changed can't be put back.
        """
        if self.unseen:
            raise ReplayError(
                f"{self.site.name}: its forward changed {self.unseen}, which its first call had left alone, so a replay would start from "
                "another value; later calls are prepared for it"
            )
        changed = self.inputs.changed()
        if not self.complete or not self.notes:
            return changed
        if self._versions() != self.reads:
            changed.update(self._changed_tensors())
        if self.watched or self.around:
            changed.update(self._changed_copies())
        return changed

    def _changed_copies(self) -> dict[int, str]:
        """Of what was copied on entry and has changed since, the replay sees the copy; it must not be what is saved."""
        lost = {}
        for t, version in self.watched:
            if t._version != version:
                self.restored[storage_of(t)] = name_in(self.roots, t)
        for around in self.around:
            t = around.moved()
            if t is None or _same(t, around.values):
                continue
            (lost if around.values is None else self.restored)[storage_of(t)] = name_in(self.roots, t)
            if around.values is not None:
                self.entry = self.entry if self.entry is not None else State([], [], [])
                if all(o is not t for o, _ in self.entry.values):
                    self.entry.values.append((t, around.values))
        return lost

    def mark_restored(self, store: dict[int, Any]) -> None:
        """What the replay saw as it was is not as it was any more: where it is itself what was saved, it can't be had."""
        for i, t in store.items():
            name = self.restored.get(storage_of(t)) if isinstance(t, Tensor) else None
            if name is not None:
                store[i] = Modified(t.shape, name)

    def _changed_tensors(self) -> dict[int, str]:
        was, tensors = dict(zip(*self.reads, strict=True)), self._readable()
        if list(map(id, tensors)) != self.reads[0]:
            new = next((name_in(self.roots, t) for t in tensors if id(t) not in was), "the set of its parameters")
            raise self.changed_error(new)
        return {storage_of(t): name_in(self.roots, t) for t in tensors if t._version != was[id(t)]}

    def changed_error(self, name: str) -> ReplayError:
        """The error for a replay that reads something else than its forward did."""
        return ReplayError(
            f"{self.site.name}: {name} was changed between forward and backward, so the replay would give other values; "
            "change it after backward, or leave this unit out of checkpointing"
        )

    def state_names(self) -> str:
        """What the unit's forward changes, for messages."""
        paths = [p for f in self.site.facts.values() for p in (*f.changes.containers, *f.changes.values)]
        return ", ".join(dict.fromkeys(map(describe, paths)))


def _let_go(frame: ReferenceType[Frame]) -> None:
    """A backward is over: what it rebuilt and did not use goes."""
    alive = frame()
    if alive is not None:
        alive.rebuilt.clear()
