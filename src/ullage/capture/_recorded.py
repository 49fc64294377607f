"""Real steps of a workload, run to write down the values and sizes that they read; everything is put back afterwards.

A read is known by its line and op, and by how many of these the step has done before. The same code runs in a captured step and in a
replay, so they ask in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ullage._source import source_line
from ullage._torch import TorchDispatchMode
from ullage.capture._op_values import NUMPY, asks_for_values, name_of, tensors

MAX_NUMEL = 1 << 18  # elements of an index whose values are written down, too. Not tuned
_PRINTS = (Tensor.__repr__, Tensor.__str__)


@dataclass(frozen=True)
class Output:
    """A tensor that such an op has made; `values` of a small index or mask."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor | None


@dataclass(frozen=True)
class Taken:
    """What one read gave: a number or an array, or tensors.

    Attributes:
        value: the number or array.
        outputs: the tensors.
        container: the class of a tuple or list of tensors.
        shown: it in words.
    """

    value: Any
    outputs: tuple[Output, ...] = ()
    container: type | None = None
    shown: str = ""


@dataclass
class Recording:
    """The reads of a first and a later step, in order, by line and op; `grows`: bytes that the later one has left behind."""

    steps: list[dict[tuple[str, str], list[Taken]]] = field(default_factory=list)
    grows: int = 0

    def find(self, step: int, key: tuple[str, str], at: int) -> Taken | None:
        """Return the read of this step with this number; steps beyond the last are like it."""
        found = self.read(step, key)
        return found[at] if at < len(found) else None

    def read(self, step: int, key: tuple[str, str]) -> list[Taken]:
        """Return what this step has read there."""
        return self.steps[min(max(step, 0), len(self.steps) - 1)].get(key, [])


def _taken(func: Any, args: Any, out: Any) -> Taken:
    if not isinstance(out, Tensor | tuple | list):
        return Taken(out, shown=f"{out:.6g}" if isinstance(out, float) else str(out))
    outputs = tuple(
        Output(tuple(t.shape), t.stride(), t.dtype, t.detach().cpu().clone() if _is_small_index(t) else None)
        for t in tensors(out)
    )
    sizes = " and ".join("x".join(map(str, o.shape)) or "1" for o in outputs[:1])
    of = "x".join(map(str, args[0].shape))
    return Taken(None, outputs, None if isinstance(out, Tensor) else type(out), f"{sizes} of {of}")


def _is_small_index(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= MAX_NUMEL


class _Ops(TorchDispatchMode):
    def __init__(self, found: dict[tuple[str, str], list[Taken]]) -> None:
        super().__init__()
        self.found, self.quiet = found, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.quiet and asks_for_values(func, args):
            self.found.setdefault((source_line(), name_of(func)), []).append(_taken(func, args, out))
        return out


class _Calls(TorchFunctionMode):
    """Reads that dispatch no op on a real tensor, or other ops than on a fake one."""

    def __init__(self, ops: _Ops) -> None:
        self.ops = ops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _listed(args[0])
        quiet = func in _PRINTS
        self.ops.quiet += quiet
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self.ops.quiet -= quiet
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(out, np.ndarray):
            taken = Taken(out.copy(), shown=f"{out.size} values")
            self.ops.found.setdefault((source_line(), NUMPY), []).append(taken)
        return out


def _listed(tensor: Tensor) -> Any:
    """As a fake tensor's `tolist`: an item at a time."""
    return tensor.item() if tensor.dim() == 0 else [_listed(x) for x in tensor]


@contextlib.contextmanager
def recording_one(recording: Recording) -> Iterator[None]:
    """Write down the values and sizes that the step inside reads."""
    found: dict[tuple[str, str], list[Taken]] = {}
    recording.steps.append(found)
    ops = _Ops(found)
    with _Calls(ops), ops:
        yield
