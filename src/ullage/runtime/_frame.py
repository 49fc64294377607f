"""One call of a unit: what its forward leaves behind, and how backward asks for it.

A frame lives as long as autograd holds one of the unit's saved tensors. What autograd packs is an index; `unpack` gives the
tensor back from what was kept, from what this backward has rebuilt, or after a replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from ullage._errors import ReplayError
from ullage.runtime import _ambient as ambient
from ullage.runtime._debug import OpNames
from ullage.runtime._digest import digest
from ullage.runtime._inputs import Inputs
from ullage.runtime._keep import Rule
from ullage.runtime._local import local, pop_hooks, push_hooks, quiet
from ullage.runtime._log import Meta, Recorder
from ullage.runtime._reach import buffers_in, name_in, objects_in, roots_of, tensors_around, tensors_in, training_flags
from ullage.runtime._replay import Modified, rebuild
from ullage.runtime._select import select
from ullage.runtime._site import Facts, Known, Site, flags_of, refused, signature_of
from ullage.runtime._state import State, Survey, Unreachable, describe

_SMALL = 4096  # elements of a buffer that is copied on entry even if no call has changed it yet
_graph_task = torch._C._current_graph_task_id
_group = getattr(torch._C, "_get_graph_exec_group", lambda: None)


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
        "case",
        "complete",
        "contexts",
        "count",
        "digests",
        "entry",
        "flags",
        "fn",
        "inputs",
        "keep",
        "kept",
        "known",
        "learning",
        "notes",
        "on_replay",
        "ops",
        "options",
        "reads",
        "reads_around",
        "rebuilt",
        "recorder",
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
        self.rebuilt: dict[Any, dict[int, Any]] = {}
        self.count = 0
        self.complete = self.stale = False
        self.digests: dict[int, bytes | None] | None = {} if options.determinism_check == "values" else None
        self.known: Known | None = None
        self.keep: frozenset[int] = frozenset()
        self.entry: State | None = None
        self.recorder: Recorder | None = None
        self.contexts: tuple[Any, Any] | None = None
        self.ops: list[str] | None = [] if options.debug else None
        self.flags = ambient.read_flags()
        self.roots = roots_of(fn) + objects_in((*args, *kwargs.values()))
        self.signature: Hashable = None
        self.learning = False
        self.unseen = ""
        self.reads: list[tuple[int, int]] = []
        self.reads_around: list[tuple[ReferenceType[Tensor], int]] = []
        self.case: tuple[Any, ...] = ()
        self.watched: list[tuple[Tensor, int]] = []
        local.quiet, before = True, local.quiet
        try:
            self.inputs = Inputs(args, kwargs)
        finally:
            local.quiet = before
        sources = (
            ambient.device_sources([a for a in args if isinstance(a, Tensor)]) if options.preserve_rng_state else []
        )
        self.rng = [(source, source[0]()) for source in sources]

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the unit's forward."""
        if (
            local.skipping
        ):  # inside the selective replay of an outer unit: nobody asks for what is saved here, so nothing is learnt
            return self._run(args, kwargs, self._pack)
        training = training_flags(self.roots)
        case = self.case = (training, flags_of(args, kwargs))
        facts = self.site.facts.get(case)
        if self.options.rule is not None and self.options.context_fn is None:
            self.signature = signature_of(args, kwargs, self.flags, training)
            self.known = self.site.shared.look_up(self.signature)
        if facts is not None:
            if facts.must_keep:  # kept by this frame, as in the first call: an outer unit must see the same in both
                out = self._run(args, kwargs, self._pack_all)
                self._keep_all()
                return out
            try:
                facts = self._note_entry(facts)
            except Unreachable:
                facts = None
        unknown = self.options.rule is not None and self.options.context_fn is None and self.known is None
        if facts is None or unknown:
            return self._learn(args, kwargs, case, facts, unknown)
        if self.known is not None:
            self.keep = self.known.selection.kept
        out = self._run(args, kwargs, self._pack)
        self._finish()
        return out

    def _note_entry(self, facts: Facts) -> Facts:
        changes = facts.changes
        if changes.containers or changes.values or changes.generators:
            with quiet():
                self.entry = State.read(self.roots, changes)
        buffers = buffers_in(self.roots)
        if buffers:
            self._note_buffers(buffers)
        if facts.host_rng or self.options.host_rng:
            self.rng.append((ambient.HOST, ambient.HOST[0]()))
        return facts

    def _keep_all(self) -> None:
        """There will be no replay. What only a replay needs may hold the graph that holds this frame."""
        self.complete = True
        self.inputs, self.roots, self.entry, self.rng = Inputs((), {}), [], None, []

    def _note_buffers(self, buffers: list[Tensor]) -> None:
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
        self.unseen = next(
            (name_in(self.roots, t) for t, version in watched if t._version != version and t.numel() > _SMALL), ""
        )
        if self.unseen:
            self.site.facts.clear()  # the next call learns
        argument = self.inputs.written()
        if argument:
            self.unseen = self.unseen or argument
            must_keep = f"some of its forwards write {argument} in place, so a replay would start from other values"
            self.site.facts[self.case] = Facts(must_keep=must_keep)
            self.site.say(f"{must_keep}; its activations are kept", warn=False)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], pack: Callable[[Tensor], int]) -> Any:
        if self.options.context_fn is not None:
            self.contexts = self.options.context_fn()
        push_hooks(pack, self.unpack)
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

    def _finish(self) -> None:
        """After a forward that went well."""
        self.complete = True
        self._look_for_unseen()
        if self.count == 0:
            return
        known = self.known
        if known is not None and not known.selection.refusal:
            if self.notes == known.notes:
                self.notes = known.notes
            else:
                self.stale = True
        local.quiet, before = True, local.quiet
        self.rng = [(s, state) for s, state in self.rng if not ambient.same_state(state, s[0]())]
        local.quiet = before
        written = self.entry.written() if self.entry is not None else ()
        self.reads = [(id(t), t._version) for t in tensors_in(self.roots) if id(t) not in written]
        self.reads_around = [(ref(t), t._version) for t in tensors_around(self.roots) if id(t) not in written]

    def _pack(self, x: Tensor) -> int:
        i = self.count
        self.count = i + 1
        self.notes.append((x.shape, x.stride(), x.dtype, x.device))
        if i in self.keep:
            local.quiet, before = True, local.quiet
            self.kept[i] = (x.detach(), x._version)  # detached: a node that saves its own output must not hold itself
            local.quiet = before
        elif self.digests is not None:
            with quiet():
                self.digests[i] = digest(x)
        return i

    # --- the first call ----------------------------------------------------------------------------------------------

    def _learn(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], case: tuple[Any, ...], facts: Facts | None, log: bool
    ) -> Any:
        """Run the forward, see what it does, and only then let go of what is not to be kept.

        It holds no more than the unit's own backward will: everything that the unit saves.
        """
        self.learning = True
        with quiet():
            survey = Survey(self.roots) if facts is None else None
        host = ambient.HOST[0]() if facts is None else None
        self.recorder = recorder = Recorder() if log else None
        try:
            with recorder if recorder is not None else contextlib.nullcontext():
                out = self._run(args, kwargs, self._pack_all)
        finally:
            self.recorder = None
        if survey is not None:
            facts = self._learn_facts(survey, host)
            self.site.facts[case] = facts
        assert facts is not None
        if facts.must_keep:
            self._keep_all()
            self.site.say(f"{facts.must_keep}; its activations are kept")
            return out
        keep: frozenset[int] = frozenset()
        if recorder is not None:
            selection = self._selection(recorder)
            keep = selection.kept
            self.known = self.site.shared.learn(self.signature, selection, self.notes)
            if self.known.selection.refusal:
                self.site.say(f"full replay: {self.known.selection.refusal}", warn=False)
        prove = not self.site.shared.proven or recorder is not None
        with quiet():
            dropped = [i for i in self.kept if i not in keep]
            if prove and self.digests is None:
                intact = [i for i in dropped if self.kept[i][0]._version == self.kept[i][1]]
                self.digests = {i: digest(self.kept[i][0]) for i in intact}
        for i in dropped:
            del self.kept[i]
        self._finish()
        return out

    def _selection(self, recorder: Recorder) -> Any:
        rule = self.options.rule
        assert rule is not None
        if compiled(self.roots):
            return refused("it is compiled, so what it saves is torch.compile's choice")
        return select(recorder.log, rule)

    def _learn_facts(self, survey: Survey, host: Any) -> Facts:
        with quiet():
            changes, self.entry = survey.changes()
        moved = ambient.host_rng_moved(host, ambient.HOST[0]())
        if moved or self.options.host_rng:
            self.rng.append((ambient.HOST, host))
        argument = self.inputs.written()
        must_keep = ""
        if changes.parameters:
            must_keep = f"its forward writes {changes.parameters[0]}, which a replay would write again"
        elif argument:
            must_keep = f"its forward writes {argument} in place, so a replay would start from other values"
        if not (changes.containers or changes.values or changes.generators):
            self.entry = None
        buffers = buffers_in(self.roots)
        if buffers:
            self._note_buffers(buffers)  # of those that it has not changed
            self.watched = []
        return Facts(changes, moved, must_keep)

    def _pack_all(self, x: Tensor) -> int:
        i = self._pack(x)
        if i not in self.kept:
            with quiet():
                self.kept[i] = (x.detach(), x._version)
        if self.recorder is not None:
            self.recorder.saved(x)
        return i

    # --- backward ----------------------------------------------------------------------------------------------------

    def unpack(self, i: int) -> Tensor:
        """The i-th saved tensor. ReplayError if it can't be what the forward saved."""
        kept = self.kept.get(i)
        if kept is not None:
            tensor, version = kept
            if tensor._version != version:
                raise ReplayError(
                    f"{self.site.name}: saved tensor {i} of shape {tuple(tensor.shape)} was modified by an inplace operation "
                    f"after the forward saved it (version {tensor._version}, expected {version}); the plain step would fail too"
                )
            return tensor
        task = _group() or _graph_task()
        store = self.rebuilt.get(task)
        if store is not None:
            found = store.pop(i, None)
            if found is not None:
                return self._sound(found, i)
        store = rebuild(self)
        found = store.pop(i)
        if task != -1 and store:
            self.rebuilt[task] = store
            if _group() is None:
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._let_go(task))
        return self._sound(found, i)

    def _sound(self, found: Any, i: int) -> Tensor:
        if isinstance(found, Modified):
            raise ReplayError(
                f"{self.site.name}: saved tensor {i} of shape {tuple(found.shape)} is modified by an inplace operation "
                "after it was saved, inside the unit; the plain step would fail too"
            )
        return found  # type: ignore[no-any-return]

    def _let_go(self, task: Any) -> None:
        """A backward is over: what it rebuilt and did not use goes."""
        self.rebuilt.pop(task, None)

    def check_reads(self) -> None:
        """Raise if something the replay reads is not what the forward read."""
        if self.unseen:
            raise ReplayError(
                f"{self.site.name}: its forward changed {self.unseen}, which its first call had left alone, so a replay would start from "
                "another value; later calls are prepared for it"
            )
        argument = self.inputs.changed()
        what = argument
        if not what and self.complete:
            written = self.entry.written() if self.entry is not None else ()
            tensors = [t for t in tensors_in(self.roots) if id(t) not in written]
            if len(tensors) != len(self.reads):
                what = "the set of its parameters"
            for t, (identity, version) in zip(tensors, self.reads, strict=False):
                if not what and (id(t) != identity or t._version != version):
                    what = name_in(self.roots, t)
            for reference, version in self.reads_around:
                held = reference()
                if held is not None and held._version != version and id(held) not in written:
                    what = what or name_in(self.roots, held)
        if what:
            raise ReplayError(
                f"{self.site.name}: {what} was changed between forward and backward, so the replay would give other values; "
                "change it after backward, or leave this unit out of checkpointing"
            )

    def state_names(self) -> str:
        """What the unit's forward changes, for messages."""
        paths = [p for f in self.site.facts.values() for p in (*f.changes.containers, *f.changes.values)]
        return ", ".join(dict.fromkeys(map(describe, paths)))


def compiled(roots: list[Any]) -> bool:
    """Is one of these modules, or one below it, compiled?"""
    modules = [m for r in roots if isinstance(r, nn.Module) for m in r.modules()]
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_torchdynamo_orig_callable") for m in modules
    )
