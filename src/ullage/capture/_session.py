"""A capture session: one fake copy of a workload, on which steps run under any assignment of options.

Idea: the step runs as it is (the user's model, loss and optimizer, and ullage's real runtime) on fake tensors, under a mode that
records ops and storages (`_tracker`). Further steps with other options run on the same copy.

Invariant: nothing of the user changes. The model, optimizer and batch are copies; generators, globals, caches and class
attributes are put back (`_environment`, `_outside`); the process runs one capture at a time. A step that can't be followed raises
CaptureError with line and module; it is never recorded wrongly.

Known non-optimalities: each failed option costs a new session (`ullage.planner.study._failed`), so that no step runs on a copy in
which one has failed. All ops go through Python. Values that depend on activations are made up and noted (`_values`, `_assumed`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ullage._bytes import format_bytes
from ullage._errors import AlreadyCheckpointed, CaptureError, ReplayError, UllageError
from ullage._torch import FakeTensor, graph_task, notes, sequence_number, tree_flatten
from ullage.apply._wrap import Unit, install, uninstall
from ullage.capture._arguments import contents
from ullage.capture._assumed import Assumed, Position, Taking
from ullage.capture._environment import unnoticed
from ullage.capture._explain import explained
from ullage.capture._fake_mode import StepMode
from ullage.capture._layouts import check_tensors
from ullage.capture._outside import KeptApart
from ullage.capture._store import CapturedStore
from ullage.capture._substitutions import as_on_cuda
from ullage.capture._trace import Signature, Storage, Trace, has_storage, unwrapped
from ullage.capture._tracker import Tracker
from ullage.capture._values import Values
from ullage.measure._reach import copied_tensors, optimizers_of
from ullage.mechanisms import Sites, UnitSettings
from ullage.runtime import Site, Tier, host_rng, host_rng_moved, is_recomputing, telling_of_skips, unit_of
from ullage.workload import Instance, Workload, missing_history, run_step, tensors_of


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: its ranges of ops and of autograd sequence numbers, and the storages that go in and come out.

    `inputs` and `outputs` are keys that a later storage may have, too; `records_in` and `records_out` are ids of the trace's
    `Storage` records.
    """

    fqn: str
    index: int
    first_op: int
    last_op: int
    first_sequence: int
    last_sequence: int
    inputs: frozenset[int]
    outputs: frozenset[int]
    shapes: tuple[tuple[int, ...], ...]
    records_in: frozenset[int] = frozenset()
    records_out: frozenset[int] = frozenset()


class OptionFailed(CaptureError):
    """A unit's option can't be run. The planner takes the option away from the unit and chooses again.

    Attributes:
        fqn: the unit.
        option: the option's name.
        cause: the error.
        why: its text, without the unit's name.
        linked: the unit was to be recomputed together with its neighbours.
    """

    told_as = CaptureError

    def __init__(self, fqn: str, option: str, cause: Exception, linked: bool = False) -> None:
        ours = isinstance(cause, UllageError)
        self.why = (str(cause) if ours else f"{type(cause).__name__}: {cause}").removeprefix(f"{fqn}: ")
        super().__init__(f"{fqn}: option {option} can't be used: {self.why}")
        self.fqn, self.option, self.cause, self.linked = fqn, option, cause, linked


def _uncompiled(model: nn.Module) -> list[str]:
    """Have a capture's own copy of a model run without the compiler, which would follow the capture; return the modules that it was on.

    `torch.compiler.set_stance` would do it, but for every thread of the process.
    """
    found = []
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "OptimizedModule":  # of `torch.compile(module)`
            module.forward = module._orig_mod.__call__
        elif getattr(module, "_compiled_call_impl", None) is not None:  # of `module.compile()`
            module._compiled_call_impl = None
        else:
            continue
        found.append(name or "the model")
    return found


class _CapturedUnit(Unit):
    """A unit whose replays substitute ops, because function modes are off inside backward, and read what their forward has read."""

    as_cuda = False
    assumed: Assumed

    def run(self, plain: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position, as_cuda = Position(self.assumed), self.as_cuda

        def captured(*args: Any, **kwargs: Any) -> Any:
            # in the forward the step's own substitutions are on
            with as_on_cuda() if as_cuda and is_recomputing() else contextlib.nullcontext(), position.read():
                return plain(*args, **kwargs)

        return super().run(captured, module, args, kwargs)


class Session:
    """Runs steps of a workload on fake tensors and records them in one trace.

    Args:
        work: the workload; its real objects are not touched.
        round_bytes: allocation granularity (512 for CUDA, 1 for CPU).
        as_cuda: estimate a CUDA device from tensors on the CPU (see `ullage.capture._substitutions`).
        explores: many assignments will run, so each uses what the runtime has learnt of a unit under another.
        like: a session of the same workload, to share known outputs of fake kernels with.
        trial: the set of made-up values, see `Assumed`.
        taking: where values come from that the step reads; default: as for `like`.
    """

    def __init__(
        self,
        work: Workload,
        round_bytes: int = 1,
        as_cuda: bool = False,
        explores: bool = False,
        like: Session | None = None,
        trial: int = 0,
        taking: Taking | None = None,
    ) -> None:
        self._as_cuda = as_cuda
        self.fake_mode = StepMode()
        # torch's cache of fake kernels forgets that two outputs share a storage, so a warm cache would give other bytes;
        # `KnownOutputs` does not forget it
        self.fake_mode.cache_enabled = False
        self.values: Values = Values(trial, taking or (None if like is None else like.values.assumed.taking))
        self.values.assumptions.update(dict.fromkeys(notes()))
        self.tracker: Tracker = Tracker(
            self.fake_mode, self.values, round_bytes, None if like is None else like.tracker, notes_nodes=not as_cuda
        )
        self.calls: list[Call] = []
        self.training: dict[str, bool] = {}  # by module, its mode at its first call that builds a graph
        self.changed_arguments: dict[str, str] = {}  # modules that change a container they are given, and its class
        self._to_come: Storage | None = None  # the part of LBFGS's history that later steps add
        self._settings: dict[str, UnitSettings] = {}
        self._sites: dict[tuple[str, UnitSettings], Site] = {}
        here = "cpu" if work.factory is not None else work.instance_device().type
        self.raised_on_purpose = False  # did a `raise` or `assert` end the last run?
        self._failed_in: tuple[BaseException | None, str] = (None, "")  # the innermost module that an error came out of
        self.store = CapturedStore(lambda: (self.tracker.clock, tuple(self.tracker.module_stack)), here)
        self.family = Sites(explores, Tier(self.store))
        with self._active(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.tracker.calibrate()
        self._apart = KeptApart(work)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.inst: Instance = work.fake_instance(self.fake_mode, self._active)
            self.tracker.generators.model = self.inst.model
            check_tensors(self.inst)
            self._apart.built(self.inst)
            self._adopt(work)
        finally:
            self._apart.leave()
        self.names = {id(m): name for name, m in self.inst.model.named_modules()}
        compiled = _uncompiled(self.inst.model)
        if compiled:
            note = f"{compiled[0]} is compiled and was captured as it runs without the compiler, which may save other tensors: no peak is promised under torch.compile"
            self.values.assumptions[note] = None

    @property
    def trace(self) -> Trace:
        """Everything recorded so far."""
        return self.tracker.trace

    @property
    def signatures(self) -> list[Signature]:
        """The distinct op calls seen so far."""
        return self.tracker.signatures

    def _adopt(self, work: Workload) -> None:
        tracker, inst = self.tracker, self.inst
        tracker.trace = Trace()
        tracker._alive = {}
        for name, p in inst.model.named_parameters():
            tracker.adopt(p, "parameter")
            tracker.resident_names[p.untyped_storage()._cdata] = name
        for name, b in inst.model.named_buffers():
            tracker.adopt(b, "buffer")
            tracker.resident_names[b.untyped_storage()._cdata] = name
        for t in tensors_of(inst.batch):
            tracker.adopt(t, "input")
        for optimizer in optimizers_of(inst):
            for t in tree_flatten([list(s.values()) for s in optimizer.state.values()])[0]:
                if isinstance(t, Tensor):
                    tracker.adopt(t, "optimizer state")
        for t in copied_tensors(inst):  # a teacher in the loss's closure, class weights
            if isinstance(t, FakeTensor) and t.is_leaf:
                tracker.adopt(t, "other")
        for fake, real in inst.twins:
            tracker.know(real, fake)
            if work.factory is not None:
                self.values.seed([fake], [real])
        inst.twins.clear()
        if work.factory is None:
            self.values.seed(tensors_of(inst.batch), tensors_of(work.batch))
            self.values.seed(list(inst.model.buffers()), list(work.model.buffers()))
            self._seed_copied(work)
            tracker.real_parameters = {id(p): p for p in work.model.parameters()}
            for p in work.model.parameters():
                if p.grad is not None:  # the user holds it during the step, beside the step's own gradients
                    tracker.adopt(p.grad, "gradient")
            if inst.step is not None or isinstance(work.optimizer, torch.optim.Optimizer):
                pairs = zip(optimizers_of(inst), optimizers_of(work), strict=True)
                states = [s for f, r in pairs for s in zip(f.state.values(), r.state.values(), strict=True)]
                for fake, real in states:
                    keys = [k for k in real if isinstance(real[k], Tensor) and real[k].numel() == 1]
                    self.values.seed([fake[k] for k in keys], [real[k] for k in keys])

    def _seed_copied(self, work: Workload) -> None:
        """Carry the values of tensors outside the model that were copied with the step, such as an average's counter."""
        own = {id(p) for p in self.inst.model.parameters()}
        fakes, reals = copied_tensors(self.inst), copied_tensors(work)
        if [(t.shape, t.dtype) for t in fakes] == [(t.shape, t.dtype) for t in reals]:
            pairs = [(f, r) for f, r in zip(fakes, reals, strict=True) if id(f) not in own and not r.requires_grad]
            self.values.seed([f for f, _ in pairs], [r for _, r in pairs])

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        self.fake_mode.owner = threading.get_ident()
        substituted = as_on_cuda() if self._as_cuda else contextlib.nullcontext()
        with substituted, unnoticed(self.tracker), self.fake_mode, self.tracker, telling_of_skips(self.tracker.skipped):
            yield

    def run(
        self,
        settings: Mapping[str, UnitSettings] | None = None,
        steps: int = 1,
        update: bool = True,
        settled: bool = False,
    ) -> None:
        """Run steps with these units wrapped; each step's first op index is appended to `trace.marks`.

        Args:
            settings: the settings of each unit; units that are not named are kept.
            steps: number of steps.
            update: run the optimizer, too (a workload's own `step` always does).
            settled: run a step before, unmarked, if a unit's next call would be a first one that keeps everything.

        Raises:
            CaptureError: the step can't be run on fake tensors.
            OptionFailed: a wrapped unit's option can't be used.
        """
        self._settings = dict(settings or {})
        modules = [(f, self.inst.model.get_submodule(f)) for f, s in self._settings.items() if not s.option.is_plain]
        for fqn, module in modules:
            install(self._unit(fqn, module), module)
        try:
            self._apart.enter()
            with self._active(), self._hooks(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                host = host_rng()
                if settled and any(self._site(f, m).learns(self._settings[f].runtime_options) for f, m in modules):
                    self._one_step(replace(self.inst, optimizer=None))
                for _ in range(steps):
                    self.trace.marks.append(self.tracker.clock)
                    self._one_step(self.inst if update else replace(self.inst, optimizer=None))
                self._fill_histories()
                if host_rng_moved(host, host_rng()):
                    note = "the step draws from Python's or numpy's generator; if that steers it, it was captured for one draw"
                    self.values.assumptions[note] = None
        except (OptionFailed, AlreadyCheckpointed):
            raise
        except Exception as error:
            ours = self._explain(error)
            if ours is error:
                raise
            raise ours from error
        finally:
            for _, module in modules:
                uninstall(module)
            self._apart.leave()
            self.tracker.module_stack.clear()
            self.tracker.replay_depth = 0

    def links(self, fqn: str) -> int:
        """Return how often a unit's input was left to the unit before it, and so not held."""
        return sum(site.links for (f, _), site in self._sites.items() if f == fqn)

    def _unit(self, fqn: str, module: nn.Module) -> Unit:
        settings, site = self._settings[fqn], self._site(fqn, module)
        if not self._as_cuda and self.values.assumed.taking.recording is None:
            return Unit(fqn, module, settings, site)
        unit = _CapturedUnit(fqn, module, settings, site)
        unit.as_cuda, unit.assumed = self._as_cuda, self.values.assumed
        return unit

    def _site(self, fqn: str, module: nn.Module) -> Site:
        settings = self._settings[fqn]
        site = self._sites.get((fqn, settings))
        if site is None:
            site = self._sites[fqn, settings] = self.family.site(fqn, module, settings)
        return site

    def _one_step(self, inst: Instance) -> None:
        def gradients() -> None:
            for p in self.inst.model.parameters():
                if p.grad is not None:
                    self.tracker.adopt(p.grad, "gradient")

        self.values.assumed.begin()
        run_step(inst, gradients)
        self.fake_mode.check()
        if inst.optimizer is not None:
            for t in tree_flatten([list(s.values()) for s in inst.optimizer.state.values()])[0]:
                if isinstance(t, Tensor):
                    self.tracker.adopt(t, "optimizer state")

    def _fill_histories(self) -> None:
        """Count the history of an LBFGS optimizer as full: the peak is an upper bound until it is, and without this it would be no bound."""
        missing = sum(missing_history(o, self.tracker.round_bytes) for o in optimizers_of(self.inst))
        if self._to_come is None and missing:
            self._to_come = Storage(missing, -1, category="optimizer state")
            self.trace.storages.append(self._to_come)
            note = f"the history of LBFGS is counted as full, {format_bytes(missing)} more than after these steps: until then the peak is an upper bound"
            self.values.assumptions[note] = None

    def _explain(self, error: Exception) -> UllageError:
        """Return the error to raise: in a step with wrapped units the one of a unit's option, because the plain step has run before."""
        from ullage.capture._checks import raised_on_purpose

        stack = self.tracker.module_stack
        wrapped = [f for f, s in self._settings.items() if not s.option.is_plain]
        self.raised_on_purpose = raised_on_purpose(error)
        ours = error if isinstance(error, UllageError) else None
        if self.fake_mode.beside and not isinstance(ours, CaptureError):  # ops of another thread are the likely cause
            ours = CaptureError(self.fake_mode.beside)
        within = self._failed_in[1] if self._failed_in[0] is error else stack[-1] if stack else ""
        self._failed_in = None, ""
        told = ours or explained(error, self.tracker.failed, within, self.values.assumed.read)
        if wrapped and (ours is None or isinstance(ours, ReplayError | CaptureError)):
            inside = next((n for n in reversed(stack) if n in wrapped), None)
            of = unit_of(error)
            fqn = (of if of in wrapped else None) or inside or self._unit_of_node(wrapped) or wrapped[0]
            option = self._settings[fqn].option
            return OptionFailed(fqn, option.name, told, option.place is not None)
        return told

    def _unit_of_node(self, wrapped: list[str]) -> str | None:
        last = self.tracker._source_of_sequence.get(self.trace.sequence[-1]) if self.trace.sequence else None
        return next((f for f in reversed(self.tracker.stacks[last[1]] if last else ()) if f in wrapped), None)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        tracker, names, mode = self.tracker, self.names, self.fake_mode
        open_calls: list[tuple[int, int, frozenset[int], tuple[tuple[int, ...], ...], list[Any], frozenset[int]]] = []
        counts: dict[str, int] = {}

        def keys(value: Any) -> frozenset[int]:
            tensors = [unwrapped(t) for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
            return frozenset(t.untyped_storage()._cdata for t in tensors if has_storage(t))

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            fqn = names.get(id(module))
            if fqn is None:
                return
            if not mode.is_owner:
                mode.enter_module(fqn)
                return
            tracker.module_stack.append(fqn)
            if fqn not in self.training and torch.is_grad_enabled():
                self.training[fqn] = module.training
            if graph_task() != -1:
                if not is_recomputing():
                    raise AlreadyCheckpointed(
                        f"{fqn or 'the model'}: runs its forward again in backward, so it is checkpointed already "
                        "(Hugging Face's or torch's own switch); turn that off, plans do not stack on it"
                    )
                tracker.replay_depth += 1
                return
            shapes = tuple(tuple(t.shape) for t in tree_flatten(args)[0] if isinstance(t, Tensor))
            sequence, given = sequence_number(), contents((args, kwargs))
            inputs = keys(args)
            records = tracker.records(inputs | keys(kwargs) if kwargs else inputs)
            open_calls.append((tracker.clock, sequence, inputs, shapes, given, records))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            fqn = names.get(id(module))
            if fqn is not None and not mode.is_owner:
                mode.leave_module()
                return
            if fqn is None or not tracker.module_stack:
                return
            tracker.module_stack.pop()
            error = sys.exc_info()[1]
            # `always_call`: this hook runs after a forward that raised
            if error is not None and self._failed_in[0] is not error:
                self._failed_in = error, fqn
            if graph_task() != -1:
                tracker.replay_depth -= 1
                return
            op, sequence, inputs, shapes, given, records = open_calls.pop()
            for (was, kind), (now, _) in zip(given, contents((args, kwargs)), strict=False):
                if was != now:
                    self.changed_arguments.setdefault(fqn, kind)
            index = counts[fqn] = counts.get(fqn, -1) + 1
            end = sequence_number()
            outputs = keys(output)
            made = tracker.records(outputs)
            self.calls.append(
                Call(fqn, index, op, tracker.clock, sequence, end, inputs, outputs, shapes, records, made)
            )

        handles = []
        for module in self.inst.model.modules():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
