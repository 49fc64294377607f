"""One call of a unit: run its forward under pack hooks, and give backward the saved tensors that it asks for.

Idea: the hooks pack an index instead of a tensor (as `torch.utils.checkpoint` does without reentry). When backward unpacks an index,
`_missing` returns the kept tensor, or one that a replay has rebuilt, or starts a replay. Unlike torch's, a settled forward runs
under no dispatch mode: it counts and compares what is saved against the notes of an earlier call, and a first call (`_learn`)
finds out the rest.

Invariant: a tensor handed to backward has the bits that the forward saved, or backward raises an error that names the unit. A frame
lives as long as autograd holds one of its indices. It must not hold, through a tensor that the caller or the unit writes to
later, the graph that holds it: that is why so much here is held detached, weakly, or only until the forward is over.

Known non-optimalities: a replay rebuilds all dropped tensors of the unit at once, and those stay in memory until backward asks
for each or the whole backward ends. The first call of each kind, and each call of a unit that can't be replayed, keeps everything.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from ullage._errors import ReplayError
from ullage._torch import at_end_of_backward, graph_group, graph_task, pop_hooks, push_hooks
from ullage.runtime.ambient import _ambient as ambient
from ullage.runtime.ambient._local import blame, local, quiet
from ullage.runtime.forward._packing import Pack, packer, packer_of_all
from ullage.runtime.ops._debug import OpNames
from ullage.runtime.replay._reads import SMALL, Around, Reads, changed_error
from ullage.runtime.replay._replay import rebuild, rebuild_arguments
from ullage.runtime.state._reach import Reached, name_in, objects_in, roots_of
from ullage.runtime.state._state import State, Unreachable, describe
from ullage.runtime.tensors._digest import comparable, digest
from ullage.runtime.tensors._fills import unset
from ullage.runtime.tensors._jagged import Rows
from ullage.runtime.tensors._memory import Back, copy_of, same_memory, storage_of
from ullage.runtime.tensors._notes import Notes
from ullage.runtime.tensors._sparse import SparseProducts
from ullage.runtime.unit._call import Call
from ullage.runtime.unit._inputs import Inputs
from ullage.runtime.unit._modified import Modified
from ullage.runtime.unit._options import Options
from ullage.runtime.unit._place import NOWHERE
from ullage.runtime.unit._site import Facts, Known, Site, flags_of, signature_of
from ullage.runtime.unit._tier import Away, tensor_of

_NONE: Any = MappingProxyType({})


class Frame:
    """One call of a unit, see above.

    Args:
        site: the unit's site.
        options: how to run it.
        fn: the unit's plain forward.
        args: positional arguments.
        kwargs: keyword arguments.
        on_replay: called at the start of every replay.
        reached: what the call reaches, if that is already known.
    """

    # class attributes, because most calls never set most of them and a frame is made on every call
    complete = stale = False
    known: Known | None = None
    entry: State | None = None
    left: Sequence[int] = ()  # versions, after the forward, of the tensors that `entry` has copies of
    contexts: tuple[Any, Any] | None = None
    digests: dict[int, bytes | None] | None = None
    ops: list[str] | None = None
    signature: Hashable = None
    kinds: Hashable = None  # the key of its facts, see `_site`
    # name of a tensor that this forward changed and no earlier call did, so no copy of its old values exists
    unseen = ""
    # autograd holds the pack hook and the hook holds these dicts, so they are emptied in place
    kept: dict[int, tuple[Tensor | Away, int]] = _NONE
    # kept tensors that are arguments of inner units; each with a copy where there will be no replay
    held: dict[int, Tensor | None] = _NONE
    # in a call that keeps everything: tensors without a graph, which autograd saves as themselves; held until the forward is over,
    # then weakly, in `leaves`
    given: dict[int, Tensor] = _NONE
    leaves: Mapping[int, ReferenceType[Tensor]] = _NONE
    restored: Mapping[int, str] = _NONE
    rows: Mapping[int, Rows] = _NONE  # offsets of the jagged tensors that it saves
    around: Sequence[Around] = ()  # tensors that the unit closes over and no module has registered
    around_written: Sequence[Around] = ()  # those that the forward itself writes to: `entry` has their old values
    watched: Sequence[tuple[Tensor, int]] = ()
    reads: Reads | None = None
    group: Any = None  # the `GraphExecGroup` of the last replay
    back: Back | None = None  # memory and dicts to put back for the replay that runs
    previous: Call | None = None  # the call whose output is this one's input, where that is not held
    place = NOWHERE
    # set by the pack hook of the forward: notes it expects, how many tensors it saw, and notes of its own once one differs
    expected: Notes
    count: Callable[[], int]
    odd: Notes | None = None

    def __init__(
        self,
        site: Site,
        options: Options,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_replay: Callable[[], None] | None = None,
        reached: Reached | None = None,
    ) -> None:
        self.site, self.options, self.fn, self.on_replay = site, options, fn, on_replay
        self.rebuilt: dict[int, Any] = {}
        # saved tensors with their versions, digested when the forward is over: kernels may fill them only after they are saved
        self.late: dict[int, tuple[Tensor, int]] = {}
        self.unsent: list[int] = []  # saved tensors to offload when the forward is over, for the same reason
        if options.determinism_check == "values":
            self.digests = {}
        if options.debug:
            self.ops = []
        self.flags = ambient.read_flags()
        self.device = self.flags[ambient.DEVICE]
        self.context = contextvars.copy_context()
        self.reached = reached if reached is not None else Reached(roots_of(fn) + objects_in(args, kwargs))
        self.roots = self.reached.roots
        # in a selective replay some of them are placeholders without memory
        if self.reached.around and not local.skipping:
            self.around = [Around(t) for t in self.reached.around]
        place = options.place
        trail = site.trail.take() if place is not None and site.trail is not None else None
        before, local.quiet = local.quiet, True
        try:
            self.inputs = Inputs(
                args, kwargs, trail[1] if trail is not None and place is not None and place.depth else None
            )
        finally:
            local.quiet = before
        if place is not None:
            self.place = place
            if trail is not None and self.inputs.linked():
                self.previous = trail[0]
                site.links += 1
        self.rng = (
            [(s, s[0]()) for s in ambient.sources_for((*args, *kwargs.values()) if kwargs else args)]
            if options.preserve_rng_state
            else []
        )

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the unit's forward."""
        # In the selective replay of an outer unit backward asks for none of this unit's saved tensors, and some of its inputs
        # are placeholders: it must not learn from them.
        if local.skipping:
            return self.run(args, kwargs, packer(self, Notes()))
        options, training = self.options, self.reached.training
        grads = (*self.inputs.kinds(), *[a.kind for a in self.around])
        kinds = self.kinds = (
            training,
            *self.reached.structures,
            *self.reached.flags,
            flags_of(args, kwargs),
            grads,
            *map(type, self.roots),
        )
        facts = self.site.facts.get(kinds)
        selective = options.rule is not None and options.context_fn is None
        if selective:
            self.signature = signature_of(args, kwargs, self.flags, training)
            if isinstance(self.fn, functools.partial):
                self.signature = (self.signature, signature_of(self.fn.args, self.fn.keywords, None, None))
            self.known = self.site.shared.look_up(self.signature)
        if facts is not None:
            # this frame keeps all itself, as the first call does: an outer unit must see the same saves in both
            if facts.must_keep or self.site.shared.distrust:
                out = self.run(args, kwargs, packer_of_all(self))
                self.keep_all()
                return out
            # A forward that changes containers is looked at twice: its first call may create an object (a cache, a lazily made
            # buffer) that only the second call changes. It is also looked at again if a path it changed has gone.
            if not (facts.looks > 1 or not facts.changes.containers) or not self._note_entry(facts):
                facts = None
        if facts is None or (selective and self.known is None):
            from ullage.runtime.forward._learn import learn  # here, as a settled call never needs it

            return learn(self, args, kwargs, facts)
        known = self.known
        proof = known.proof if known is not None else self.site.shared.proof
        if proof.claim(self) and self.digests is None:
            self.digests = {}
        expected = self.site.noted.get(kinds) if known is None else known.notes
        out = self.run(
            args,
            kwargs,
            packer(
                self, expected or Notes(), *((known.selection.kept, known.selection.away) if known is not None else ())
            ),
        )
        self.finish()
        if known is None and self.notes is not expected:
            self.site.noted[kinds] = self.notes
        return out

    def _note_entry(self, facts: Facts) -> bool:
        """Copy the state that the forward will change; False if a recorded path no longer leads to it."""
        changes = facts.changes
        if changes.containers or changes.values or changes.generators:
            try:
                with quiet():
                    self.entry = State.read(self.roots, changes)
            except Unreachable:
                return False
        buffers = self.reached.buffers()
        if buffers:
            self.note_buffers(buffers)
        if self.reached.arrays:
            self._note_arrays()
        if facts.host_rng or self.options.host_rng:
            self.rng.append((ambient.HOST, ambient.HOST[0]()))
        return True

    def note_buffers(self, buffers: list[Tensor]) -> None:
        """Copy small buffers that no call has changed so far, and watch the versions of large ones."""
        entry = self.entry if self.entry is not None else State([], [], [])
        known = {id(o) for o, _ in entry.values}
        self.watched = [(t, t._version) for t in buffers if id(t) not in known]
        with quiet():
            entry.values += [(t, copy_of(t)) for t, _ in self.watched if t.numel() <= SMALL]
        if entry.values:
            self.entry = entry

    def _note_arrays(self) -> None:
        """Copy small numpy arrays, whether or not a call has changed them: an array has no version that would show it."""
        entry = self.entry if self.entry is not None else State([], [], [])
        known = {id(o) for o, _ in entry.values}
        entry.values += [(a, a.copy()) for a in self.reached.arrays if a.size <= SMALL and id(a) not in known]
        self.entry = entry if entry.values else self.entry

    def _look_for_unseen(self) -> None:
        """Record inputs that this forward changed though the learning call did not: no copy of their old values exists."""
        if self.watched:
            watched = self.watched
            self.watched = [(t, v) for t, v in watched if t._version == v and t.numel() <= SMALL]
            large = [t for t, version in watched if t._version != version and t.numel() > SMALL]
            if large:
                self.unseen = name_in(self.roots, large[0])
                self.site.facts.clear()  # the next call learns
        argument = self.inputs.written()
        if not argument and self.around:
            written = self.entry.written() if self.entry is not None else ()
            self.around_written = [a for a in self.around if id(a.tensor()) in written]
            self.around = [a for a in self.around if id(a.tensor()) not in written]
            argument = next((name_in(self.roots, t) for a in self.around if (t := a.written()) is not None), "")
        if argument:
            self.unseen = self.unseen or argument
            must_keep = f"some of its forwards write {argument} in place, so a replay would start from other values"
            self.site.facts[self.kinds] = Facts(must_keep=must_keep)
            self.site.say(f"{must_keep}; its activations are kept", warn=False)
        if self.unseen:
            self._let_go_of_replay()

    def settle(self) -> bool:
        """After a forward that keeps everything: did it give a saved tensor other memory (`.data =`)? Backward then sees that memory."""
        moved = [(i, x) for i, x in self.given.items() if not same_memory(x, tensor_of(self.kept[i][0]))]
        for i, x in moved:
            if x._version == self.kept[i][1]:  # otherwise backward raises, as in the plain step
                with quiet():
                    self.kept[i] = (x.detach(), x._version)
        if self.given:
            self.leaves = {i: ref(x) for i, x in self.given.items()}
            self.given.clear()
        return bool(moved)

    def keep_all(self) -> None:
        """Give up the replay of this call, all its saved tensors being kept."""
        self.settle()
        self.notes = self.noted()
        self.complete = True
        self._let_go_of_replay()
        self.previous = None

    def _let_go_of_replay(self) -> None:
        """Drop what only a replay needs: through a tensor that the unit wrote to, it may hold the graph that holds this frame."""
        self.inputs, self.roots, self.entry, self.rng, self.around = Inputs((), {}), [], None, [], ()
        self.watched, self.around_written, self.reached, self.fn = (), (), Reached(()), _gone

    def noted(self) -> Notes:
        """Return the notes of what this forward has saved, so far if it is not over."""
        if self.complete:
            return self.notes
        if self.odd is not None:
            return self.odd
        count = self.count()
        return self.expected if count == len(self.expected) else Notes(self.expected[:count])

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
                    self.device = ambient.default_device()
                if self.ops is not None:
                    if not self.reached.is_compiled():
                        stack.enter_context(SparseProducts())
                    stack.enter_context(OpNames(self.ops))
                return self.fn(*args, **kwargs)
            raise ReplayError(
                f"{self.site.name}: the forward context of context_fn has swallowed an exception that the forward raised, so there is no output; "
                "have its __exit__ let exceptions through"
            )
        except BaseException:
            if self.given:  # a tensor in it that is written to later may hold the rest of the graph
                self.given.clear()
            raise
        finally:
            pop_hooks()

    def finish(self) -> None:
        """Close a forward that raised nothing: drop generators it did not draw from, note the versions of tensors it could read."""
        self.notes = self.noted()
        self.complete = True
        if self.late and self.digests is not None:
            self.digests.update(self.digests_of(self.late))
            self.late = {}
        for i in self.unsent:
            x, version = self.kept[i]
            if isinstance(x, Tensor) and x._version == version:
                self.kept[i] = (self.site.send(x) or x, version)
        self._look_for_unseen()
        if self.entry is not None:
            self.left = [o._version if isinstance(o, Tensor) else -1 for o, _ in self.entry.values]
        self.reached.around = []  # a tensor in it that is written to later may hold the graph that holds this frame
        if not self.notes:
            return
        if self.known is not None and self.notes is not self.expected and self.notes != self.known.notes:
            self.stale = not self.known.selection.refusal
        self.rng = [(s, state) for s, state in self.rng if not ambient.same_state(state, s[0]())]
        self.reads = Reads(self)

    def digests_of(self, saved: Mapping[int, tuple[Tensor | Away, int]]) -> dict[int, bytes | None]:
        """Return digests of saved tensors, the forward being over; leave out those that its kernels never set."""
        without: set[int] = set()
        if self.site.fills and all(ambient.same_state(state, s[0]()) for s, state in self.rng):
            without = unset(saved, self.noted())
        with quiet():
            found = {i: (tensor_of(x), version) for i, (x, version) in saved.items() if i not in without}
            return {i: digest(x) for i, (x, version) in found.items() if x._version == version and comparable(x)}

    # --- backward ----------------------------------------------------------------------------------------------------

    def unpacker(self) -> Callable[[int], Tensor]:
        """Return the unpack hook. It raises ReplayError if it can't give what the forward saved."""
        rebuilt = self.rebuilt.pop

        def unpack(i: int) -> Tensor:
            found = rebuilt(i, None)
            if found is not None and type(found) is not Modified:
                return found  # type: ignore[no-any-return]
            try:
                if found is None:
                    found = self._missing(i)
                return found if type(found) is not Modified else self._modified(i, found)  # type: ignore[no-any-return]
            except Exception as error:
                blame(error, self.site.name)
                raise

        return unpack

    def _modified(self, i: int, found: Modified) -> Any:
        if found.by:
            if found.now is not None and found.argument and local.giving is not None:
                local.giving.moved[storage_of(found.now)] = found.by
                return found.now
            raise changed_error(self, found.by)
        if i in (store := rebuild_arguments(self)):
            self.rebuilt.update({j: x for j, x in store.items() if type(self.rebuilt.get(j)) is Modified})
            if local.giving is not None:
                local.giving.copied[storage_of(store[i])] = "an argument"
            return store[i]
        raise ReplayError(
            f"{self.site.name}: saved tensor {i} of shape {tuple(found.shape)} is modified by an inplace operation "
            "after it was saved, inside the unit; the plain step would fail too"
        )

    def _missing(self, i: int) -> Any:
        kept = self.kept.get(i)
        if kept is not None and kept[0]._version != kept[1] and i in self.held:
            # an argument that an inner unit holds for its replay: the plain step does not save it, so it may change there
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
            leaf = self.leaves[i]() if i in self.leaves else None
            # a leaf that was given other memory since (`.data =`): the plain step's backward reads that memory, too
            return tensor_of(tensor) if leaf is None or same_memory(leaf, tensor_of(tensor)) else leaf
        if self.group is not None and self.group is graph_group():
            raise ReplayError(
                f"{self.site.name}: saved tensor {i} is asked for a second time within one torch.utils.checkpoint.GraphExecGroup: the backwards in it "
                "must not overlap. Call one of them outside of it, or use a group for each"
            )
        if self.previous is not None:
            from ullage.runtime.replay._sweep import make_inputs

            make_inputs(self, recording=graph_task() != -1)
            if i in self.rebuilt:
                return self.rebuilt.pop(i)
        store = rebuild(self)
        found = store.pop(i)
        self.group = graph_group()
        if store and graph_task() != -1:
            self.take(store)
        return found

    def take(self, store: dict[int, Any]) -> None:
        """Hold the tensors that a replay has rebuilt, for the rest of this backward."""
        self.rebuilt.update(store)
        self.group = graph_group()
        if self.group is None:
            # weakly: a unit's inputs are freed when its last node has run, not when the whole backward is over
            at_end_of_backward(functools.partial(_let_go, ref(self)))

    def state_names(self) -> str:
        """Name the state that the unit's forward changes, for messages."""
        paths = [p for f in self.site.facts.values() for p in (*f.changes.containers, *f.changes.values)]
        return ", ".join(dict.fromkeys(map(describe, paths)))


def _gone() -> None:
    """Stands for a unit's forward that won't run again."""


def _let_go(frame: ReferenceType[Frame]) -> None:
    """At the end of a backward, free what was rebuilt and not asked for."""
    alive = frame()
    if alive is not None:
        alive.rebuilt.clear()
