"""The record of a capture: op signatures, ops in order, and the lifetime of every storage."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ullage._torch import is_wrapped
from ullage._torch import unwrapped as _inside


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor in an op signature."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    conj: bool = False  # the bits of a lazy `.conj()` and of its imaginary part: a kernel may copy before it starts
    neg: bool = False

    def __repr__(self) -> str:
        """Leave out bits that are not set: saved profiles have costs under this text, and older ones know no bits."""
        bits = "".join(f", {name}=True" for name in ("conj", "neg") if getattr(self, name))
        plain = f"shape={self.shape!r}, stride={self.stride!r}, dtype={self.dtype!r}, device={self.device!r}"
        return f"TensorSpec({plain}{bits})"


@dataclass(frozen=True)
class Signature:
    """A distinct op call: the op, its tensors' specs and its other arguments."""

    func: Any
    args: Any
    kwargs: Any
    outputs: tuple[TensorSpec, ...]
    output_bytes: int


def signature_key(s: Signature) -> str:
    """A stable name of a signature."""
    return f"{s.func}|{s.args!r}|{sorted(s.kwargs.items(), key=lambda kv: kv[0])!r}|{s.outputs!r}"


@dataclass(slots=True)  # a trace has tens of thousands, and each `__dict__` would be one more object to collect
class Storage:
    """One storage's lifetime, in op indices: alive from `birth` (during that op) to after op `death`."""

    nbytes: int
    birth: int
    death: int = sys.maxsize
    position: int = -1  # among the storages its op allocated; -1: not from an op
    category: str = ""
    # its size, if known from elsewhere: its node was measured as a whole, or it has no memory
    booked: int | None = None


@dataclass(slots=True)
class NodeRun:
    """One run of an autograd node's formula in a backward.

    Attributes:
        name: name of the node, such as `CumprodBackward0`.
        sequence: its sequence number.
        made_by: index of the signature of the forward op that made it.
        needs: per tensor among that op's arguments, whether it requires grad.
        grads: specs of the gradients that it was given (None for an undefined one); None if they were not seen.
        ops: indices of the ops of the formula, without those of replays and of tensors that are brought back.
    """

    name: str
    sequence: int
    made_by: int
    needs: tuple[bool, ...]
    grads: tuple[Any, ...] | None
    ops: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Between:
    """The moment, before op `at`, at which a tensor was made that no op makes (a generator's state).

    Since the op before, the storages in `dead` have been freed, and those in `born` were made and are alive.
    """

    at: int
    born: tuple[Storage, ...]
    dead: tuple[Storage, ...]


@dataclass
class Trace:
    """One run's ops and storages. Parallel lists, one entry per op."""

    signature: list[int] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    stack: list[int] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    recomputed: list[bool] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # bytes of tensors made of an op's Python numbers
    storages: list[Storage] = field(default_factory=list)
    between: list[Between] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)  # op index at which each step starts
    nodes: list[NodeRun] = field(default_factory=list)
    # per op of a node that was measured as a whole: bytes at its peak
    inside: dict[int, int] = field(default_factory=dict)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the innermost tensor inside the wrappers of torch.func's transforms."""
    while is_wrapped(tensor):
        tensor = _inside(tensor)
    return tensor


def has_storage(tensor: Tensor) -> bool:
    """Does a tensor have one storage? Sparse and nested ones don't."""
    return tensor.layout is torch.strided and not tensor.is_nested


def spec_of(value: Any) -> Any:
    """Return a hashable description of an op argument."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return TensorSpec(tuple(value.shape), (), value.dtype, str(value.device))
        bits = value.is_conj(), value.is_neg()
        return TensorSpec(tuple(value.shape), tuple(value.stride()), value.dtype, value.device.type, *bits)
    if isinstance(value, list | tuple):
        return tuple(spec_of(v) for v in value)
    if isinstance(value, torch.Generator):
        return None
    return value


def tensors_of(spec: Any) -> Any:
    """Return a description made by `spec_of` with its tensors only, each in its place."""
    if isinstance(spec, dict):
        return tuple((k, tensors_of(v)) for k, v in spec.items())
    if isinstance(spec, tuple):
        return tuple(tensors_of(v) for v in spec)
    return spec if isinstance(spec, TensorSpec) else None
