"""A dispatch mode that follows every storage of a step from birth to death, on fake tensors.

Sits above a `FakeTensorMode`. Storages are followed by weak references to their Python objects, as torch's own
`MemTracker` does. Two things differ between a real step and one seen by a dispatch mode, and are put right here: the
autograd engine accumulates gradients in place only when no mode is active, and kernels allocate inside themselves
(see `ullage.cost`, which measures that per op signature).
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
from ullage.capture._kernels import FakeKernels
from ullage.capture._layouts import NO_NESTED
from ullage.capture._nodes import NodeRuns
from ullage.capture._numbers import SavedNumbers
from ullage.capture._op_values import MANY, tensors
from ullage.capture._outputs import argument_key
from ullage.capture._trace import Between, Signature, Storage, Trace, spec_of, written_arguments
from ullage.capture._values import Values
from ullage.runtime import draws, is_bookkeeping, recomputing_units

aten = torch.ops.aten
_DEVICE_QUERY = torch.ops.prim.device.default


class Tracker(TorchDispatchMode):
    """Records a `Trace`; see the module's docstring. What `like` knows of fake kernels is shared with it."""

    def __init__(self, fake_mode: StepMode, values: Values, round_bytes: int = 1, like: Tracker | None = None) -> None:
        super().__init__()
        self.round_bytes = round_bytes
        self.kernels: FakeKernels = FakeKernels(fake_mode, values, None if like is None else like.kernels, self.place)
        self.trace = Trace()
        self.signatures: list[Signature] = []
        self.stacks: list[tuple[str, ...]] = [()]
        self.phase = "forward"
        self.moved_generators: dict[torch.Generator, Tensor] = {}  # the step's own, and how they were found
        self.generator = values.generator  # stands for torch's default one, which other threads may draw from
        self.module_stack: list[str] = []
        self.replay_depth = 0  # how many of these are there because of a replay
        self.real_parameters: dict[int, Tensor] = {}  # held, since ids of the dead are used again
        self.resident_names: dict[int, str] = {}  # of buffers and parameters, by storage
        self.writes: dict[str, set[str]] = {}  # resident tensors that forwards write, and the modules that run then
        self.own_generators: set[str] = set()  # modules that draw from a generator that is not torch's default
        self._signature_ids: dict[Any, int] = {}
        self._stack_ids: dict[tuple[str, ...], int] = {(): 0}
        self._alive: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._queried: set[int] = set()
        self._source_of_sequence: dict[int, tuple[str, int]] = {}
        self._numbers = SavedNumbers()
        self._died: list[Storage] = []  # since the last op
        self._unique = (0, 0, 0)
        self._guests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # real tensors from outside: their twins
        self.failed: FailedOp | None = None
        self._nodes = NodeRuns()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch's guard against being compiled costs more per op than the tracker does, and a capture is eager."""
        return False

    @property
    def clock(self) -> int:
        """Index of the op that comes next."""
        return len(self.trace.signature)

    def adopt(self, tensor: Tensor, category: str = "", empty: bool = False) -> None:
        """Follow a tensor's storage from now on (no-op if it is followed already).

        Raises:
            CaptureError: it has none, being sparse.
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
        """Note when `held`, a storage or what stands for one, dies."""
        self.trace.storages.append(record)

        def died(_: Any, record: Storage = record, key: int = key) -> None:
            record.death = self.clock - 1
            self._died.append(record)
            current = self._alive.get(key)
            if current is not None and current[1] is record:
                del self._alive[key]

        self._alive[key] = (weakref.ref(held, died), record)

    def adopt_between_ops(self, tensor: Tensor) -> None:
        """Follow a tensor that no op has made; what dies before the next op may be alive beside it."""
        first = len(self.trace.storages)
        while first > 0 and self.trace.storages[first - 1].birth == self.clock:
            first -= 1
        self.adopt(tensor)
        born = [t for t in self.trace.storages[first:] if t.death >= self.clock]
        dead = [t for t in self._died if t.birth < self.clock]
        self.trace.between.append(Between(self.clock, tuple(born), tuple(dead)))

    def records(self, keys: Iterable[int]) -> frozenset[int]:
        """Ids of the records of storages that are alive, by their keys; the trace holds the records."""
        known = (self._alive.get(k) for k in keys)
        return frozenset(id(k[1]) for k in known if k is not None and k[0]() is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op on fakes and record it."""
        kwargs = kwargs or {}
        if func is _DEVICE_QUERY:
            self._queried.add(id(args[0]))
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        self.kernels.fake_mode.check()
        self.look_at_numbers()
        if func.namespace == "profiler":  # `record_function` around an optimizer's step: no work, no bytes
            return func(*args, **kwargs)
        in_engine = graph_task() != -1
        if in_engine:
            self._nodes.begin()
            if func is aten.add.Tensor and self._accumulates(args, kwargs):
                self._nodes.end()
                func = aten.add_.Tensor if self._in_place(args) else func
        self._queried.clear()
        if func not in _LIFTS:
            args = self._adopted(func, args)
            if kwargs:
                kwargs = dict(zip(kwargs, self._adopted(func, tuple(kwargs.values())), strict=True))
        key = (func, argument_key(args), tuple([(k, argument_key(v)) for k, v in kwargs.items()]))
        try:
            out, fresh = self.kernels.call(key, func, args, kwargs)
        except Exception as error:
            if self.failed is None or self.failed.error is not error:
                self.failed = FailedOp(error, func, self.place(), next(iter(self.module_stack[-1:]), ""))
            raise
        if draws(func, args):
            self._advance(kwargs.get("generator"))
        self._record(key, func, args, kwargs, out, in_engine, fresh)
        return out

    def _advance(self, generator: torch.Generator | None) -> None:
        """A fake kernel draws nothing, but the runtime keeps the state of a generator that moved, and so must we.

        It moves by its state alone, so that a replay draws what the forward drew.
        """
        own = self.generator if generator is None or generator is torch.default_generator else generator
        if own is not self.generator:
            self.moved_generators.setdefault(own, own.get_state())
        own.manual_seed((own.initial_seed() + 1) % 2**64)

    def _accumulates(self, args: Any, kwargs: Any) -> bool:
        """Is this the engine adding to a gradient buffer?

        It asks every gradient for its device right after the node that made it, so its own add is the one whose second
        argument was just asked for.
        """
        if kwargs or len(args) != 2 or not isinstance(args[1], Tensor) or torch.is_grad_enabled():
            return False
        return id(args[1]) in self._queried and args[0].shape == args[1].shape

    def _in_place(self, args: Any) -> bool:
        """Does nothing else hold the buffer? The conditions are those of `can_accumulate_inplace` in torch's `input_buffer.cpp`."""
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
        """Learn what the reference counts of a gradient that only the engine holds look like from here."""
        x = torch.ones(2, requires_grad=True)
        y = x * 1.0
        (y * y).sum().backward()
        del x, y
        self.trace, self._alive = Trace(), {}

    def place(self) -> str:
        """The line that runs now, or in backward the line whose gradient is computed."""
        if graph_task() == -1:
            return source_line() or ("the optimizer's step" if self.phase == "optimizer" else "")
        node = autograd_node()
        known = self._source_of_sequence.get(node._sequence_nr()) if node is not None else None
        return source_line() or (known[0] if known is not None else "")

    def _adopted(self, func: Any, args: Any) -> Any:
        """Replace real tensors among the arguments by fake twins: constants that are part of neither model nor batch."""
        for a in args:
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

    def _guest(self, func: Any, real: Tensor) -> Tensor:
        """The fake twin of a tensor from outside, which has been there all along.

        Raises:
            CaptureError: the step would train it.
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
        if real.is_nested:  # torch keeps one of its own, once a process has made any
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

    def _record(self, key: Any, func: Any, args: Any, kwargs: Any, out: Any, in_engine: bool, fresh: bool) -> None:
        trace = self.trace
        before = len(trace.storages)
        if fresh:
            for tensor in tensors(out):  # an empty one too: its real twin may not be (oneDNN's LSTM workspace)
                self.adopt(tensor, empty=True)
            for position, storage in enumerate(trace.storages[before:]):
                storage.position = position
                if func is _ZEROS:
                    storage.booked = 0
        if kwargs:
            self._note_generator(kwargs)
        if (func._schema.is_mutable or func in _BATCH_NORMS) and not in_engine:
            self._note_mutation(func, args, kwargs)
        index = self._signature_ids.get(key)
        if index is None:
            index = self._signature_ids[key] = len(self.signatures)
            specs = tuple(spec_of(o) for o in tensors(out))
            fixed = {k: spec_of(v) for k, v in kwargs.items()}
            allocated = sum(s.nbytes for s in trace.storages[before:] if s.booked is None)
            self.signatures.append(Signature(func, spec_of(args), fixed, specs, allocated))
        replaying = recomputing_units()
        if self.replay_depth and not replaying:  # a replay that stops early runs no hooks after its modules
            del self.module_stack[-self.replay_depth :]
            self.replay_depth = 0
        sequence, source, stack = -1, "", tuple(self.module_stack)
        node = autograd_node() if in_engine else None
        if in_engine:
            sequence = node._sequence_nr() if node is not None else -1
            known = self._source_of_sequence.get(sequence)
            if replaying:
                stack, source = (*replaying, *stack), source_line()  # the unit's own forward runs below its hooks
            elif known is not None:
                source, stack_id = known
                stack = self.stacks[stack_id]
            if node is not None and not replaying and not is_bookkeeping():
                self._nodes.ran(trace, node, sequence)
        else:
            sequence = sequence_number()
            source = source_line()
        stack_id = self._stack_ids.setdefault(stack, len(self.stacks))
        if stack_id == len(self.stacks):
            self.stacks.append(stack)
        if not in_engine:
            # the op that made the node; those after it that make none see the same number
            self._source_of_sequence.setdefault(sequence - 1, (source, stack_id))
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
        """Note that a selective replay skips an op; its node saves its numbers all the same."""
        self.look_at_numbers()
        if self.round_bytes == 1:
            self._numbers.note(func, args, out, None)

    def look_at_numbers(self) -> None:
        """Follow what the last op has saved of numbers: they were made just before it ran."""
        for held, key, nbytes in self._numbers.look():
            known = self._alive.get(key)
            if known is None or known[0]() is None:  # a node made in backward saves the tensor of the forward's again
                self._follow(held, key, Storage(nbytes, self.clock - 1))

    def _note_mutation(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note buffers and other resident tensors that a forward writes to."""
        if self.phase != "forward":
            return
        written = written_arguments(func, args, kwargs)
        if func in _BATCH_NORMS and len(args) > 5 and args[5]:
            written += [args[3], args[4]]
        for tensor in tensors(written):
            key = tensor.untyped_storage()._cdata
            name = self.resident_names.get(key)
            if name is not None and self.module_stack:
                self.writes.setdefault(name, set()).update(self.module_stack)

    def _note_generator(self, kwargs: Any) -> None:
        if kwargs.get("generator") not in (None, torch.default_generator):
            self.own_generators.update(self.module_stack)


_LIFTS = {aten.lift_fresh.default, aten.lift_fresh_copy.default}  # a constant on its way in
_ZEROS = aten._efficientzerotensor.default  # what autograd has for gradients of zero: it has a size and no memory
_BATCH_NORMS = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten._native_batch_norm_legit.default}
_BATCH_NORMS |= {aten._batch_norm_with_update.default}
