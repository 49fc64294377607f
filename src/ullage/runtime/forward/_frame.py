"""One call of a unit: what its forward leaves behind, and how backward asks for it.

A frame lives as long as autograd holds one of the unit's saved tensors. What autograd packs is an index; `_missing` gives the
tensor back from what was kept, from what was rebuilt, or after a replay.
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
from ullage.runtime.tensors._memory import Back, same_memory, storage_of
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
    """See the module's docstring.

    Args:
        site: what is known of the unit.
        options: how to run it.
        fn: the unit's plain forward.
        args: positional arguments.
        kwargs: keyword arguments.
        on_replay: called at the start of every replay.
        reached: what it reaches, if that has been looked up.
    """

    # most calls leave most of this as it is here
    complete = stale = False
    known: Known | None = None
    entry: State | None = None
    left: Sequence[int] = ()  # versions of what `entry` has copies of, after the forward
    contexts: tuple[Any, Any] | None = None
    digests: dict[int, bytes | None] | None = None
    ops: list[str] | None = None
    signature: Hashable = None
    kinds: Hashable = None  # what its facts depend on
    unseen = ""
    # autograd holds the pack hook, so what that fills is emptied in place
    kept: dict[int, tuple[Tensor | Away, int]] = _NONE
    # of these, arguments of units in this one; copies where there is no replay
    held: dict[int, Tensor | None] = _NONE
    # where all is kept: tensors without a graph, which autograd saves as themselves; held until the forward is over, then weakly
    given: dict[int, Tensor] = _NONE
    leaves: Mapping[int, ReferenceType[Tensor]] = _NONE
    restored: Mapping[int, str] = _NONE
    rows: Mapping[int, Rows] = _NONE  # of the jagged tensors among what it saves
    around: Sequence[Around] = ()
    around_written: Sequence[Around] = ()  # those that the forward itself writes to: `entry` has what was in them
    watched: Sequence[tuple[Tensor, int]] = ()
    reads: Reads | None = None
    group: Any = None  # the `GraphExecGroup` that it was last rebuilt in
    back: Back | None = None  # what is put back for the replay that runs
    previous: Call | None = None  # the call whose output makes this one's input
    place = NOWHERE
    # what the pack hook of its forward notes
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
        # with their versions; digested when the forward is over, as they may be filled only then
        self.late: dict[int, tuple[Tensor, int]] = {}
        self.unsent: list[int] = []  # they are offloaded when the forward is over, for the same reason
        if options.determinism_check == "values":
            self.digests = {}
        if options.debug:
            self.ops = []
        self.flags = ambient.read_flags()
        self.device = self.flags[ambient.DEVICE]
        self.context = contextvars.copy_context()
        self.reached = reached if reached is not None else Reached(roots_of(fn) + objects_in(args, kwargs))
        self.roots = self.reached.roots
        if self.reached.around and not local.skipping:  # placeholders, some of them
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
        # in the selective replay of an outer unit nobody asks for what is saved here: nothing is learnt
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
            if (
                facts.must_keep or self.site.shared.distrust
            ):  # kept by this frame, as in the first call: an outer unit must see the same in both
                out = self.run(args, kwargs, packer_of_all(self))
                self.keep_all()
                return out
            if not (facts.looks > 1 or not facts.changes.containers) or not self._note_entry(facts):
                facts = None
        if facts is None or (selective and self.known is None):
            from ullage.runtime.forward._learn import learn  # which runs frames; not on the hot path

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
        """Copy the state that the forward will change; False if it is not where it was."""
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
        """Buffers that no call has changed so far: small ones are copied all the same, others watched."""
        entry = self.entry if self.entry is not None else State([], [], [])
        known = {id(o) for o, _ in entry.values}
        self.watched = [(t, t._version) for t in buffers if id(t) not in known]
        with quiet():
            entry.values += [(t, t.detach().clone()) for t, _ in self.watched if t.numel() <= SMALL]
        if entry.values:
            self.entry = entry

    def _note_arrays(self) -> None:
        """Small numpy arrays are copied, changed so far or not: they have no version that would show it."""
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
        """After a forward that keeps what it saves: has it given something of that other memory (`.data =`)? Backward then sees that."""
        moved = [(i, x) for i, x in self.given.items() if not same_memory(x, tensor_of(self.kept[i][0]))]
        for i, x in moved:
            if x._version == self.kept[i][1]:  # else it raises, as in the plain step
                with quiet():
                    self.kept[i] = (x.detach(), x._version)
        if self.given:
            self.leaves = {i: ref(x) for i, x in self.given.items()}
            self.given.clear()
        return bool(moved)

    def keep_all(self) -> None:
        """There will be no replay. What only a replay needs may hold the graph that holds this frame."""
        self.settle()
        self.notes = self.noted()
        self.complete = True
        self._let_go_of_replay()
        self.previous = None

    def _let_go_of_replay(self) -> None:
        """Nothing will run again: what a replay needs may hold, through a tensor that the unit wrote to, the graph that holds this."""
        self.inputs, self.roots, self.entry, self.rng, self.around = Inputs((), {}), [], None, [], ()
        self.watched, self.around_written, self.reached, self.fn = (), (), Reached(()), _gone

    def noted(self) -> Notes:
        """What this forward has saved, so far if it is not over."""
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
            if self.given:  # written to later, one may hold what is left of the graph
                self.given.clear()
            raise
        finally:
            pop_hooks()

    def finish(self) -> None:
        """After a forward that went well: generators nobody drew from go, versions of what it read are noted."""
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
        self.reached.around = []  # written to later, such a tensor may hold the graph that holds this
        if not self.notes:
            return
        if self.known is not None and self.notes is not self.expected and self.notes != self.known.notes:
            self.stale = not self.known.selection.refusal
        self.rng = [(s, state) for s, state in self.rng if not ambient.same_state(state, s[0]())]
        self.reads = Reads(self)

    def digests_of(self, saved: Mapping[int, tuple[Tensor | Away, int]]) -> dict[int, bytes | None]:
        """Digests of tensors that this forward has saved, now that it is over; none of what its kernels have left unset."""
        without: set[int] = set()
        if self.site.fills and all(ambient.same_state(state, s[0]()) for s, state in self.rng):
            without = unset(saved, self.noted())
        with quiet():
            found = {i: (tensor_of(x), version) for i, (x, version) in saved.items() if i not in without}
            return {i: digest(x) for i, (x, version) in found.items() if x._version == version and comparable(x)}

    # --- backward ----------------------------------------------------------------------------------------------------

    def unpacker(self) -> Callable[[int], Tensor]:
        """The unpack hook. ReplayError if it can't give what the forward saved."""
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
            leaf = self.leaves[i]() if i in self.leaves else None
            # given other memory since (`.data =`), the plain step's backward sees that
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
        """Keep what a replay has rebuilt, for the rest of this backward."""
        self.rebuilt.update(store)
        self.group = graph_group()
        if self.group is None:
            # weakly: a unit's inputs go when its last node has run, not when the whole backward is over
            at_end_of_backward(functools.partial(_let_go, ref(self)))

    def state_names(self) -> str:
        """What the unit's forward changes, for messages."""
        paths = [p for f in self.site.facts.values() for p in (*f.changes.containers, *f.changes.values)]
        return ", ".join(dict.fromkeys(map(describe, paths)))


def _gone() -> None:
    """In the place of a unit's forward that won't run again."""


def _let_go(frame: ReferenceType[Frame]) -> None:
    """A backward is over: what it rebuilt and did not use goes."""
    alive = frame()
    if alive is not None:
        alive.rebuilt.clear()
