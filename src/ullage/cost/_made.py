"""Make up arguments to run an op alone: tensors of the right shapes and strides, with values that most ops accept.

A few kernels allocate bytes that depend on values: how many elements a mask selects, how many indices are distinct, the norm of a
matrix whose exponential is taken. Those run on several fillings, and the most bytes of any of them count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ullage._torch import negated_view, tree_map
from ullage.capture._nodes import tensors_in
from ullage.capture._trace import Signature, TensorSpec
from ullage.cost._roofline import spec_bytes, specs_in

aten = torch.ops.aten
MAX_BYTES = 8 * 2**30
_INDEXED = {aten.embedding.default: 0, aten.nll_loss_forward.default: 0}
_COUNTED = {aten.masked_select.default: 1, aten.index.Tensor: 1}  # where the mask is that says how much comes out
_SKIP = {aten._local_scalar_dense.default, aten._pin_memory.default}


@dataclass(frozen=True)
class Filling:
    """Values of made-up tensors.

    Attributes:
        floating: every element of a floating or complex tensor.
        least, count: integers run from `least`, `count` of them over and over; 0: as many as there is room for.
        every: each how manieth element of a mask is True; 0: none.
    """

    floating: float = 0.5
    least: int = 0
    count: int = 1
    every: int = 0


PLAIN = Filling()
_MASKS = (Filling(every=1), Filling(every=2))
_DISTINCT = Filling(count=0)
_COUNTED_FROM_ONE = Filling(least=1)
_PIVOTS = {aten.lu_unpack.default, aten.linalg_lu_solve.default, aten.linalg_ldl_solve.default}
_BAGS = {aten._embedding_bag_backward.default, aten._embedding_bag_dense_backward.default}  # how many of them are empty
# a norm for each degree of the polynomials (aten/native/LinearAlgebra.cpp), and one for which the matrix is scaled first
_NORMS = (1e-5, 1e-3, 1e-2, 0.1, 1.0, 8.0)


def fillings(s: Signature, through: Iterable[Any]) -> list[Filling]:
    """Arguments to run an op on, the plain ones first: all values that its bytes may depend on.

    Args:
        s: the op's signature.
        through: the ops that run on its arguments: itself, or those of its node.
    """
    ops, dtypes = {f._overloadpacket for f in through}, {t.dtype for t in specs_in([s.args, s.kwargs])}
    found = [_COUNTED_FROM_ONE if s.func in _PIVOTS else PLAIN]
    if torch.bool in dtypes and s.func not in _COUNTED and not all(torch.Tag.pointwise in f.tags for f in through):
        found += _MASKS
    if aten._unique in ops:
        found.append(_DISTINCT)
    if s.func in _BAGS and s.outputs[0].shape[0] > 1:
        found.append(_COUNTED_FROM_ONE)
    if aten.linalg_matrix_exp in ops:
        found += [Filling(floating=norm / max(s.args[0].shape[-1], 1)) for norm in _NORMS]
    return found


def make_tensor(spec: TensorSpec, high: int = 1, filling: Filling = PLAIN) -> Tensor:
    """A tensor of this spec; integers are below `high`, where that is more than 1."""
    span = 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True)) if math.prod(spec.shape) else 0
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        base = torch.empty(span, dtype=spec.dtype, device=spec.device).fill_(filling.floating)
    elif spec.dtype == torch.bool:
        base = torch.zeros(span, dtype=spec.dtype, device=spec.device)
        if filling.every:
            base[:: filling.every] = True
    else:
        count = high if high > 1 else max(filling.count, 1)
        # no draw: RNG stays as found
        base = (torch.arange(span, device=spec.device) % count + filling.least).to(spec.dtype)
    made = base.as_strided(spec.shape, spec.stride)
    if spec.conj:
        made = made.conj()
    return negated_view(made) if spec.neg else made


def arguments(s: Signature, filling: Filling = PLAIN) -> tuple[Any, Any]:
    """Arguments to call an op of this signature on."""
    high = 1
    if s.func in _INDEXED:
        high = s.args[0].shape[0] if s.func is aten.embedding.default else s.args[0].shape[-1]
    elif s.func is aten.embedding_dense_backward.default:
        high = s.args[2]
    elif filling.count == 0:  # indices are right if they are below every size
        high = min((n for t in specs_in(s.args) if t.dtype.is_floating_point for n in t.shape), default=1)

    def make(value: Any) -> Any:
        return make_tensor(value, high, filling) if isinstance(value, TensorSpec) else value

    def listed(value: Any) -> Any:
        return [listed(v) for v in value] if isinstance(value, tuple) else value

    args = tree_map(make, [listed(a) for a in s.args])
    if s.func in _COUNTED:
        for mask in tensors_in(args[_COUNTED[s.func]]):
            if mask.dtype in (torch.bool, torch.uint8):
                _choose(mask, args[0], s.outputs[0].shape)
    if s.func is aten.mkldnn_rnn_layer_backward.default:  # reads a workspace that only its forward can fill
        reverse, mode, hidden, layers, biases, train, both, sizes, batch_first = args[13:22]
        with torch.enable_grad():
            args[22] = aten.mkldnn_rnn_layer(
                *args[:7], reverse, sizes, mode, hidden, layers, biases, both, batch_first, train
            )[3]
    return args, {k: make(v) for k, v in s.kwargs.items()}


def _choose(mask: Tensor, source: Tensor, wanted: Sequence[int]) -> None:
    """Set as much of a mask as makes an output of this shape."""
    rest = max(source.numel(), mask.numel()) // max(mask.numel(), 1)
    chosen = math.prod(wanted) // max(rest, 1)
    mask.copy_((torch.arange(mask.numel(), device=mask.device) < chosen).view(mask.shape))


def measurable(s: Signature) -> bool:
    """May an op be run alone: no values are asked for, no other process takes part, and it is small enough."""
    if s.func in _SKIP or "c10d" in s.func.namespace:
        return False
    inputs = specs_in([s.args, s.kwargs])
    if any(len(i.stride) != len(i.shape) for i in inputs):
        return False
    return sum(spec_bytes(i) for i in inputs) + s.output_bytes <= MAX_BYTES
