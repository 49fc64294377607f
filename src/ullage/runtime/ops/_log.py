"""The op log of one call of a unit, with the tensors that autograd saved, in order.

A tensor is logged as its value: (storage, offset, shape, stride, dtype, bits of lazy views). A storage has one number from its
allocation until it is freed. A log holds shapes and numbers only, no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ullage._source import source_line
from ullage._torch import FakeTensor, OpOverload, StorageWeakRef, TorchDispatchMode, tree_flatten
from ullage.runtime.ambient._local import local
from ullage.runtime.ops._writes import FILLS, overlap, parameters_in, written
from ullage.runtime.tensors import _sparse as sparse
from ullage.runtime.tensors._memory import storage_of
from ullage.runtime.tensors._notes import lazy_bits, meta_of

aten = torch.ops.aten

Value = tuple[Any, ...]  # (storage number, offset, shape, stride, dtype, `lazy_bits`)

# ops that return a value to Python, so a replay must have their input
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.item.default}
# C++ asks fake tensors and subclasses for their device, sizes and strides by these (`prim::device` of a fake tensor, `aten::sym_size` of
# a jagged one). It also asks where it can't unwind: `InputMetadata`'s constructor does, and an error raised there ends the process.
# So each dispatch mode here passes them on before it looks at anything.
_METADATA = (
    "size", "stride", "numel", "dim", "storage_offset", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_contiguous",
    "sym_is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "layout",
)  # fmt: skip
_PACKETS = [p for n in _METADATA if (p := getattr(aten, n, None)) is not None]
QUERIES = frozenset(getattr(p, overload) for p in _PACKETS for overload in p.overloads())
# ops that read the shape, dtype and device of their argument, not its values
SHAPE_ONLY = {
    getattr(aten, n).default
    for n in (
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros", "new_ones", "new_full",
        "new_empty_strided",
    )
}  # fmt: skip
# ops with this tag have output shapes that are known only once they have run
DATA_DEPENDENT = torch.Tag.dynamic_output_shape


def is_query(func: Any) -> bool:
    """Is this a question about a tensor's metadata rather than an op? Nothing may be raised in it, see `_METADATA`."""
    return func in QUERIES or getattr(func, "namespace", "") == "prim"


def draws(func: Any, args: Any) -> bool:
    """Does this op draw random numbers? Attention without dropout is tagged so, but draws none."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    dropout = next((i for i, a in enumerate(func._schema.arguments) if a.name == "dropout_p"), None)
    return dropout is None or (dropout < len(args) and args[dropout] != 0)


def _must_run(func: Any, args: Any) -> bool:
    shapes_in_place = torch.Tag.inplace_view in func.tags  # a placeholder would keep the shape it had
    return func in READS or func.namespace not in ("aten", "prims") or shapes_in_place or draws(func, args)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


@dataclass
class Op:
    """One op: its arguments, its results, and the storages it wrote to.

    Attributes:
        func: the overload.
        inputs: values of its tensor arguments.
        outputs: per leaf of its result: (value, meta) of a tensor, (None, constant) of anything else.
        spec: the result's structure.
        returns: per leaf of the result, which tensor argument it is (in-place ops), or -1.
        written: values that it writes to.
        must_run: a replay never skips it: it draws, returns a value to Python, or is not one of torch's own.
        source: the model's own line.
    """

    func: Any
    inputs: list[Value]
    outputs: list[tuple[Value | None, Any]]
    spec: Any
    returns: list[int]
    written: list[Value]
    must_run: bool
    source: str = ""

    @cached_property
    def writes(self) -> set[int]:
        """Storages that it writes to."""
        return {value[0] for value in self.written}


@dataclass
class Log:
    """The ops, the saved values, the storages that came from outside, and why skipping is not safe ("" if it is)."""

    ops: list[Op] = field(default_factory=list)
    saved: list[Value] = field(default_factory=list)
    saved_at: list[int] = field(default_factory=list)  # per saved value, how many ops had run
    outside: set[int] = field(default_factory=set)
    refusal: str = ""
    dynamic: bool = False


class Assignments(TorchFunctionMode):
    """Sees `t.data = ...`, which is no op: a replay that skips ops might assign a placeholder, which has no memory.

    Args:
        log: gets a refusal if there is such an assignment.
    """

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _SET_DATA:
            self._log.refusal = (
                f"`.data =` at {source_line() or 'unknown line'} gives a tensor other memory, which no op shows"
            )
        return sparse.call(func, args, kwargs)


class Recorder(TorchDispatchMode):
    """Writes a `Log` while a unit's forward runs; it changes nothing in that."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What Dynamo runs to compile is not the unit's. Without this it compiles nothing, and `torch.cond` needs it to."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch's wrapper imports Dynamo at the first call, 1.2 s. `keep_eager` marks the method instead."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self._numbers: dict[int, tuple[int, StorageWeakRef]] = {}
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if local.quiet or is_query(func):
            return func(*args, **kwargs)
        if not isinstance(func, OpOverload):
            self.log.refusal = f"{func} is a higher-order op"
            return func(*args, **kwargs)
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        inputs = [self.value(t) for t in tensors] if func not in SHAPE_ONLY else []
        try:
            out = sparse.run(func, args, kwargs)
        except Exception:  # the unit may catch it, so a replay must run this op and raise as well
            self.log.ops.append(Op(func, inputs, [], tree_flatten(())[1], [], [], True, source_line()))
            raise
        self._note(func, args, kwargs, tensors, inputs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], inputs: list[Value], out: Any) -> None:
        given = {i[0] for i in inputs} if func not in SHAPE_ONLY else {self.value(t)[0] for t in tensors}
        leaves, spec = tree_flatten(out)
        outputs: list[tuple[Value | None, Any]] = []
        returns = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                outputs.append((self.value(leaf, given), meta_of(leaf)))
                returns.append(next((i for i, t in enumerate(tensors) if t is leaf), -1))
            else:
                outputs.append((None, leaf))
                returns.append(-1)
        self._refuse_unknown([*tensors, *leaves], func)
        self.log.dynamic |= DATA_DEPENDENT in func.tags
        values = [self.value(t) for t in written(func, args, kwargs)]
        op = Op(func, inputs, outputs, spec, returns, values, _must_run(func, args), source_line())
        self.log.ops.append(op)

    def _refuse_unknown(self, tensors: list[Any], func: Any) -> None:
        for t in tensors:
            if isinstance(t, Tensor) and type(t) not in (Tensor, torch.nn.Parameter) and not isinstance(t, FakeTensor):
                self.log.refusal = f"{func} has a {type(t).__name__}, a subclass of Tensor"
            elif isinstance(t, Tensor) and t.layout != torch.strided:
                self.log.refusal = f"{func} has a tensor that is not strided"

    def parameters_written(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters among some tensors that an op has written to; see `Writes`, which does the same without a log."""
        numbers = set[int]().union(*(op.writes for op in self.log.ops))
        known = ((t, self._numbers.get(storage_of(t))) for t in parameters_in(tensors))
        return [t for t, number in known if number is not None and number[0] in numbers]

    def behind(self, saved: Mapping[int, tuple[Any, int]]) -> list[int]:
        """Return which saved tensors an op wrote to after autograd had saved them, without moving their version; see `Writes`."""
        writing = [(at, op) for at, op in enumerate(self.log.ops) if op.writes and op.func._schema.name not in FILLS]
        same = [i for i, (t, version) in saved.items() if isinstance(t, Tensor) and t._version == version]
        return [i for i in same if self._written_after(i, writing)]

    def _written_after(self, i: int, writing: list[tuple[int, Op]]) -> bool:
        value, saved_at = self.log.saved[i], self.log.saved_at[i]
        later = (op for at, op in writing if at >= saved_at and value[0] in op.writes)
        # the storage alone does not tell: the chunks of a GRU's gates share one, and each is written by itself
        return any(overlap(value, given) for op in later for given in op.written if given[0] == value[0])

    def value(self, t: Tensor, given: set[int] | None = None) -> Value:
        """Return a tensor's value; `given`: storages of the arguments of the op that just made it, which it may share."""
        if t.layout != torch.strided:
            return (-1, 0, t.shape, (), t.dtype, 0)
        storage = t.untyped_storage()
        key = storage._cdata
        known = self._numbers.get(key)
        fresh = known is None or known[1].expired() or (given is not None and known[0] not in given)
        if fresh:
            known = (self._next, StorageWeakRef(storage))
            self._numbers[key] = known
            self._next += 1
            if given is None:
                self.log.outside.add(known[0])
        assert known is not None
        return (known[0], t.storage_offset(), t.shape, t.stride(), t.dtype, lazy_bits(t))

    def saved(self, t: Tensor) -> None:
        """Log that autograd saves this tensor now."""
        self.log.saved.append(self.value(t))
        self.log.saved_at.append(len(self.log.ops))
        self._refuse_unknown([t], "autograd")
