"""A dispatch mode that follows every storage of a step on fake tensors from its allocation until it is freed.

Idea: the mode sits above a `FakeTensorMode` and follows storages by weak references to their Python objects, as torch's own
`MemTracker` does. It records each op with its signature, module stack, source line and autograd node.

Invariant: the trace is that of the real step, not of one under a mode. Two differences are put right: the autograd engine
accumulates gradients in place only if no mode is active (`_accumulates`, `_in_place`), and kernels allocate inside themselves (`ullage.cost`
measures that per op signature). Tensors that no mode sees are followed apart: those made of Python numbers (`_numbers`), and
generators' states (`adopt_between_ops`).

Known non-optimalities: a library's own caching and the allocator's fragmentation are not in the trace. Formulas that run other ops under
a mode are corrected afterwards, per node (`_nodes`).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ullage._errors import CaptureError
from ullage._source import source_line
from ullage._torch import (
    FakeTensor,
    TorchDispatchMode,
    WeakTensorKeyDictionary,
    autograd_node,
    disable_modes,
    graph_task,
    is_dense,
    sequence_number,
    storage_users,
)
from ullage.capture._explain import FailedOp
from ullage.capture._fake_mode import StepMode
from ullage.capture._generators import Generators
from ullage.capture._kernels import FakeKernels
from ullage.capture._layouts import NO_NESTED
from ullage.capture._nodes import NodeRuns
from ullage.capture._numbers import SavedNumbers
from ullage.capture._op_values import MANY, tensors
from ullage.capture._outputs import KnownCall
from ullage.capture._trace import Between, Signature, Storage, Trace, spec_of
from ullage.capture._values import Values
from ullage.runtime import draws, is_bookkeeping, recomputing_units
from ullage.runtime.ops._writes import may_write, written

aten = torch.ops.aten
_DEVICE_QUERY = torch.ops.prim.device.default
_ADD, _ADD_IN_PLACE = aten.add.Tensor, aten.add_.Tensor


class Tracker(TorchDispatchMode):
    """Records a `Trace`, see above. It shares known outputs of fake kernels with `like`.

    `notes_nodes`: for autograd's nodes to be measured whole, which an estimate does not do.
    """

    def __init__(
        self,
        fake_mode: StepMode,
        values: Values,
        round_bytes: int = 1,
        like: Tracker | None = None,
        notes_nodes: bool = True,
    ) -> None:
        super().__init__()
        self.round_bytes = round_bytes
        self.kernels: FakeKernels = FakeKernels(fake_mode, values, None if like is None else like.kernels, self.place)
        values.assumed.module = lambda: self.module_stack[-1] if self.module_stack else ""
        self.trace = Trace()
        self.signatures: list[Signature] = []
        self.stacks: list[tuple[str, ...]] = [()]
        self.phase = "forward"
        self.generators = Generators(values.generator)
        self.module_stack: list[str] = []
        self.replay_depth = 0  # number of modules on the stack that a replay runs
        self.real_parameters: dict[int, Tensor] = {}  # by id; held, because the id of a freed object is used again
        self.resident_names: dict[int, str] = {}  # names of buffers and parameters, by storage
        # by name of a resident tensor that a forward writes, the modules that run then
        self.writes: dict[str, set[str]] = {}
        self._signature_ids: dict[int, int] = {}  # by the id of a `KnownCall`, which `kernels` holds
        self._ops: dict[int, _Op] = {}  # by id, because an op's own hash runs Python; each entry holds its op
        self._stack_ids: dict[tuple[str, ...], int] = {(): 0}
        self._alive: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._queried: set[int] = set()
        self._source_of_sequence: dict[int, tuple[str, int]] = {}
        self._numbers = SavedNumbers()
        self._died: list[Storage] = []  # storages freed since the last op
        self._unique = (0, 0, 0)
        self._guests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # fake twins of real tensors from outside
        self.failed: FailedOp | None = None
        self._nodes = NodeRuns() if notes_nodes else None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch's guard against compilation costs more per op than the tracker, and a capture is eager."""
        return False

    @property
    def clock(self) -> int:
        """The index of the next op."""
        return len(self.trace.signature)

    def adopt(self, tensor: Tensor, category: str = "", empty: bool = False) -> None:
        """Follow a tensor's storage from now on (no-op if it is followed already).

        Raises:
            CaptureError: the tensor is sparse, so it has no one storage.
        """
        if tensor.layout is not torch.strided:
            where = self.place()
            raise CaptureError(
                f"{where + ': ' if where else ''}a tensor {tuple(tensor.shape)} of layout {tensor.layout} is used, and what a step does with "
                "sparse tensors can't be predicted; make the ops that use it an op of yours with a fake kernel "
                "(torch.library.custom_op, register_fake) that holds it, or use a dense tensor, best a buffer of the model"
            )
        storage = tensor.untyped_storage()
        key = storage._cdata
        nbytes = -(-storage.nbytes() // self.round_bytes) * self.round_bytes
        known = self._alive.get(key)
        if known is not None and known[0]() is not None:
            if known[1].nbytes == nbytes:
                if category and not known[1].category:
                    known[1].category = category
                return
            known[1].death = self.clock - 1
        if nbytes > 0 or empty:
            self._follow(storage, key, Storage(nbytes, self.clock - 1 if category else self.clock, category=category))

    def _follow(self, held: Any, key: int, record: Storage) -> None:
        """Note when `held`, a storage or its stand-in, is freed."""
        self.trace.storages.append(record)

        def died(_: Any, record: Storage = record, key: int = key) -> None:
            record.death = self.clock - 1
            self._died.append(record)
            current = self._alive.get(key)
            if current is not None and current[1] is record:
                del self._alive[key]

        self._alive[key] = (weakref.ref(held, died), record)

    def adopt_between_ops(self, tensor: Tensor) -> None:
        """Follow a tensor that no op has made. A storage freed before the next op may be alive beside it, so that is noted."""
        first = len(self.trace.storages)
        while first > 0 and self.trace.storages[first - 1].birth == self.clock:
            first -= 1
        self.adopt(tensor)
        born = [t for t in self.trace.storages[first:] if t.death >= self.clock]
        dead = [t for t in self._died if t.birth < self.clock]
        self.trace.between.append(Between(self.clock, tuple(born), tuple(dead)))

    def records(self, keys: Iterable[int]) -> frozenset[int]:
        """Return the ids of the records of living storages, given their keys; the trace holds the records."""
        known = (self._alive.get(k) for k in keys)
        return frozenset(id(k[1]) for k in known if k is not None and k[0]() is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op on fakes and record it."""
        kwargs = kwargs or {}
        if func is _DEVICE_QUERY:
            self._queried.add(id(args[0]))
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        if self.kernels.fake_mode.beside:
            self.kernels.fake_mode.check()
        if self.round_bytes == 1:  # see `_record`
            self.look_at_numbers()
        op = self._ops.get(id(func)) or self._op(func)
        if op.is_profiler:  # `record_function` around an optimizer's step: it takes no time and no bytes
            return func(*args, **kwargs)
        in_engine = graph_task() != -1
        if in_engine:
            if self._nodes is not None:
                self._nodes.begin()
            if func is _ADD and self._accumulates(args, kwargs):
                if self._nodes is not None:
                    self._nodes.end()
                if self._in_place(args):
                    func, op = _ADD_IN_PLACE, self._op(_ADD_IN_PLACE)
        self._queried.clear()
        if not op.lifts:
            args = self._adopted(func, args)
            if kwargs:
                kwargs = dict(zip(kwargs, self._adopted(func, tuple(kwargs.values())), strict=True))
        known = self.kernels.known.call(func, args, kwargs)
        try:
            out, fresh = self.kernels.call(known, args, kwargs)
        except Exception as error:
            if self.failed is None or self.failed.error is not error:
                self.failed = FailedOp(error, func, self.place(), next(iter(self.module_stack[-1:]), ""))
            raise
        if op.may_draw and draws(func, args):
            self.generators.draw(kwargs.get("generator"), self.module_stack)
        self._record(known, op, args, kwargs, out, in_engine, fresh)
        return out

    def _op(self, func: Any) -> _Op:
        """Return the facts about an op."""
        return self._ops.setdefault(id(func), _Op(func))

    def _accumulates(self, args: Any, kwargs: Any) -> bool:
        """Is this op the engine's own add to a gradient buffer?

        The engine asks every gradient for its device right after the node that made it. So its add is the one whose second
        argument was just asked.
        """
        if kwargs or len(args) != 2 or not isinstance(args[1], Tensor) or torch.is_grad_enabled():
            return False
        return id(args[1]) in self._queried and args[0].shape == args[1].shape

    def _in_place(self, args: Any) -> bool:
        """Does only the engine hold the buffer? These are the conditions of `can_accumulate_inplace` in torch's `input_buffer.cpp`."""
        buffer = args[0]
        counts = (
            buffer._use_count(),
            storage_users(buffer.untyped_storage()._cdata),
            sys.getrefcount(buffer),
        )
        if self._unique == (0, 0, 0):  # the calibration run: a gradient that is certainly unique
            self._unique = counts
        dense = is_dense(buffer)
        return dense and all(c <= u for c, u in zip(counts, self._unique, strict=True))

    def calibrate(self) -> None:
        """Learn the reference counts, as seen from here, of a gradient that only the engine holds."""
        x = torch.ones(2, requires_grad=True)
        y = x * 1.0
        (y * y).sum().backward()
        del x, y
        self.trace, self._alive = Trace(), {}

    def place(self) -> str:
        """Return the line that runs now, or in backward the line whose gradient is computed."""
        if graph_task() == -1:
            return source_line() or ("the optimizer's step" if self.phase == "optimizer" else "")
        node = autograd_node()
        known = self._source_of_sequence.get(node._sequence_nr()) if node is not None else None
        return source_line() or (known[0] if known is not None else "")

    def _adopted(self, func: Any, args: Any) -> Any:
        """Replace real tensors among the arguments (constants that belong to neither model nor batch) by fake twins."""
        for a in args:
            if type(a) is FakeTensor:
                continue
            if isinstance(a, MANY) and a and (a[0] is None or isinstance(a[0], Tensor)):
                if any(isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in a):
                    break
            elif isinstance(a, Tensor) and not isinstance(a, FakeTensor):
                break
        else:
            return args
        return tuple(
            type(a)(self._adopted(func, tuple(a)))
            if type(a) in (list, tuple)
            else self._guest(func, a)
            if isinstance(a, Tensor) and not isinstance(a, FakeTensor)
            else a
            for a in args
        )

    def know(self, real: Tensor, fake: Tensor) -> None:
        """Let a fake tensor of the step stand for a real one also where code reaches the real one its own way."""
        if not real.requires_grad:
            self._guests[real] = fake

    def _guest(self, func: Any, real: Tensor) -> Tensor:
        """Return the fake twin of a tensor from outside, which counts as alive since before the step.

        Raises:
            CaptureError: the step would train it, or fake tensors have no such kind.
        """
        known: Tensor | None = self._guests.get(real)
        if known is not None:
            return known
        where = f"{self.place()}: {func} uses "
        if id(real) in self.real_parameters:
            raise CaptureError(
                f"{where}a parameter of the real model; the loss or step reaches the model "
                "in a way that can't be copied. Pass it as an argument or use Workload.from_factory"
            )
        what = f"a tensor {tuple(real.shape)} of {real.dtype} that is no parameter or buffer of the model, nor in the batch"
        if real.requires_grad and (torch.is_grad_enabled() or not real.is_leaf):
            raise CaptureError(
                f"{where}{what}, and it requires grad, so that the step would write to its gradient; make it a parameter of "
                "the model, or build the model and what it uses in a function for Workload.from_factory"
            )
        if real.is_nested:  # torch itself keeps and uses one, once a process has made any nested tensor
            raise CaptureError(f"{self.place()}: {NO_NESTED}")
        if real.layout is not torch.strided or type(real) not in (Tensor, torch.nn.Parameter):
            kind = str(real.layout) if type(real) is Tensor else type(real).__name__
            raise CaptureError(
                f"{where}{what} ({kind}), which can't be made a fake one; make the ops that use it an op of yours with a fake kernel "
                "(torch.library.custom_op, register_fake) that holds it, or use a dense tensor, best a buffer of the model"
            )
        with disable_modes(), torch.no_grad():
            fake = self.kernels.fake_mode.from_tensor(real.detach())
            self.kernels.values.seed([fake], [real])
        self._guests[real] = fake
        self.adopt(fake, "other")
        record = self._alive[fake.untyped_storage()._cdata][1] if real.numel() else None
        if record is not None:
            record.birth = -1
        return fake

    def _record(
        self, known: KnownCall, op: _Op, args: Any, kwargs: Any, out: Any, in_engine: bool, fresh: bool
    ) -> None:
        trace, func = self.trace, op.func
        before = len(trace.storages)
        if fresh:
            for tensor in tensors(out):  # an empty one, too: the real kernel's may have bytes (oneDNN's LSTM workspace)
                self.adopt(tensor, empty=True)
            for position, storage in enumerate(trace.storages[before:]):
                storage.position = position
                if func is _ZEROS:
                    storage.booked = 0
        if op.may_write and not in_engine:
            self._note_mutation(func, args, kwargs)
        index = self._signature_ids.get(id(known))
        if index is None:
            index = self._signature_ids[id(known)] = len(self.signatures)
            specs = tuple(spec_of(o) for o in tensors(out))
            fixed = {k: spec_of(v) for k, v in kwargs.items()}
            allocated = sum(s.nbytes for s in trace.storages[before:] if s.booked is None)
            self.signatures.append(Signature(func, spec_of(args), fixed, specs, allocated))
        replaying = recomputing_units()
        if self.replay_depth and not replaying:  # a replay that stopped early has run no forward hooks of its modules
            del self.module_stack[-self.replay_depth :]
            self.replay_depth = 0
        sequence, source, stack = -1, "", tuple(self.module_stack)
        node = autograd_node() if in_engine else None
        if in_engine:
            sequence = node._sequence_nr() if node is not None else -1
            made = self._source_of_sequence.get(sequence)
            if replaying:  # a replay calls the unit's forward without its hooks
                stack, source = (*replaying, *stack), source_line()
            elif made is not None:
                source, stack_id = made
                stack = self.stacks[stack_id]
            if node is not None and self._nodes is not None and not replaying and not is_bookkeeping():
                self._nodes.ran(trace, node, sequence)
        else:
            sequence = sequence_number()
            source = source_line()
        stack_id = self._stack_ids.setdefault(stack, len(self.stacks))
        if stack_id == len(self.stacks):
            self.stacks.append(stack)
        if not in_engine:
            # the first op to see a number made the node; later ops that make no node see the same number
            self._source_of_sequence.setdefault(sequence - 1, (source, stack_id))
            if self._nodes is not None:
                self._nodes.made(sequence - 1, index, args, kwargs)
        numbers = self._numbers.note(func, args, out, None if replaying else node) if self.round_bytes == 1 else 0
        trace.signature.append(index)
        trace.phase.append("backward" if in_engine else self.phase)
        trace.stack.append(stack_id)
        trace.sequence.append(sequence)
        trace.source.append(source)
        trace.recomputed.append(bool(replaying))
        trace.numbers.append(numbers)
        self._died.clear()

    def skipped(self, func: Any, args: Any, out: Any) -> None:
        """Note that a selective replay skips an op: autograd still makes its node, which saves the op's numbers."""
        self.look_at_numbers()
        if self.round_bytes == 1:
            self._numbers.note(func, args, out, None)

    def look_at_numbers(self) -> None:
        """Follow the tensors of numbers that the last op has saved; they were made just before it ran."""
        for held, key, nbytes in self._numbers.look():
            known = self._alive.get(key)
            if known is None or known[0]() is None:  # otherwise a node made in backward saves the forward node's tensor
                self._follow(held, key, Storage(nbytes, self.clock - 1))

    def _note_mutation(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note buffers and other resident tensors that a forward writes to."""
        if self.phase != "forward":
            return
        for tensor in written(func, args, kwargs):
            key = tensor.untyped_storage()._cdata
            name = self.resident_names.get(key)
            if name is not None and self.module_stack:
                self.writes.setdefault(name, set()).update(self.module_stack)


# `torch.tensor(...)` passes a new real tensor to these
_LIFTS = {aten.lift_fresh.default, aten.lift_fresh_copy.default}
_ZEROS = aten._efficientzerotensor.default  # autograd's gradient of zeros: it has a size and no memory


class _Op:
    """The facts about an op that the tracker needs each time it runs, looked up once."""

    __slots__ = ("func", "is_profiler", "lifts", "may_draw", "may_write")

    def __init__(self, func: Any) -> None:
        self.func = func
        self.is_profiler = func.namespace == "profiler"
        self.lifts = func in _LIFTS
        self.may_draw = torch.Tag.nondeterministic_seeded in func.tags
        self.may_write = may_write(func)
