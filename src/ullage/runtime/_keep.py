"""Which ops are not to be done again: named levels, collections of ops, callables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ullage._errors import ArgumentError

aten = torch.ops.aten

Rule = Callable[[Any, int], bool]  # (op, n): is the n-th call of its kind not to be done again?
Keep = str | Collection[Any] | Callable[[Any], bool]

_names = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _flash_attention_forward "
    "_efficient_attention_forward"
)
ATTENTION = {getattr(aten, n).default for n in _names.split() if hasattr(aten, n)}
MATMUL = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
MATMUL |= {op.default for n in ("_grouped_mm", "_scaled_mm") if (op := getattr(aten, n, None)) is not None}
ROUTING = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argmax.default}
ROUTING |= {aten.nonzero.default, aten.multinomial.default, aten.max.dim, aten.min.dim}

# From the most saved bytes to the least. Every second matmul is torchtitan's default (its own comment calls it
# arbitrary); it is offered as one level among others and chosen only where the solver finds it best.
LEVELS = {
    "matmul_attention": "keep the outputs of matmuls, convolutions and attention",
    "half_matmul_attention": "keep the outputs of every second matmul or convolution and of attention",
    "attention": "keep the outputs of attention",
}


class LevelRule:
    """The rule of a named level; "" keeps routing outputs only."""

    def __init__(self, level: str, routing: bool = True) -> None:
        self.name, self.level, self.routing = f"{level}+{routing}", level, routing

    def __call__(self, op: Any, n: int) -> bool:
        """See `Rule`; matmuls are one kind, see `kind_of`."""
        if op in ROUTING:
            return self.routing
        if op in ATTENTION:
            return bool(self.level)
        if op not in MATMUL or self.level in ("", "attention"):
            return False
        return self.level == "matmul_attention" or n % 2 == 0


class CallableRule:
    """The rule of a user's callable. A function that is written in a call is another object each time, but the same rule."""

    def __init__(self, keep: Callable[[Any], bool]) -> None:
        self.keep = keep
        code = getattr(keep, "__code__", None)
        self._is = [code] if code is not None else [keep]
        if code is not None:
            self._is += [
                *(c.cell_contents for c in getattr(keep, "__closure__", None) or ()),
                *(getattr(keep, "__defaults__", None) or ()),
            ]

    def __call__(self, op: Any, n: int) -> bool:
        """See `Rule`."""
        return bool(self.keep(op))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CallableRule) or len(self._is) != len(other._is):
            return False
        return self.keep == other.keep or all(a is b for a, b in zip(self._is, other._is, strict=True))

    def __hash__(self) -> int:
        return hash(getattr(self.keep, "__code__", type(self.keep)))


def kind_of(op: Any) -> Any:
    """What calls are counted by: all matmuls together, other ops each for itself."""
    return "matmul" if op in MATMUL else op


@functools.cache
def level_rule(level: str, routing: bool = True) -> LevelRule:
    """The rule of a level."""
    return LevelRule(level, routing)


def rule_of(keep: Keep) -> Rule:
    """The rule that a `keep=` argument names.

    Raises:
        ArgumentError: it names none.
    """
    if isinstance(keep, str):
        if keep not in LEVELS:
            raise ArgumentError(f"keep={keep!r}: expected one of {', '.join(map(repr, LEVELS))}, ops, or a callable")
        return level_rule(keep)
    if callable(keep):
        return CallableRule(keep)
    if isinstance(keep, Collection):
        return _of_ops(frozenset(_op(o) for o in keep))
    raise ArgumentError(
        f"keep: expected a level's name, a collection of op overloads or a callable, got {type(keep).__name__}"
    )


@functools.cache
def _of_ops(ops: frozenset[Any]) -> Rule:
    return lambda op, n: op in ops


def _op(op: Any) -> Any:
    if isinstance(op, torch._ops.OpOverload):
        return op
    hint = f"; did you mean {op}.default?" if isinstance(op, torch._ops.OpOverloadPacket) else ""
    raise ArgumentError(f"keep: {op!r} is not an op overload such as torch.ops.aten.mm.default{hint}")


def torch_contexts(keep: Keep) -> Callable[[], tuple[Any, Any]]:
    """torch's selective contexts with the nearest policy, for `torch.compile`: op outputs, not saved tensors."""
    if isinstance(keep, str) and keep == "half_matmul_attention":
        keep = "matmul_attention"  # a policy that counts is not one that Dynamo traces
    if isinstance(keep, str):
        keep = _LEVEL_OPS[keep]
    if callable(keep):
        return functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, keep))
    return functools.partial(create_selective_checkpoint_contexts, list(keep))


def _policy(keep: Callable[[Any], bool], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep(op) else CheckpointPolicy.PREFER_RECOMPUTE


_LEVEL_OPS = {"matmul_attention": [*MATMUL, *ATTENTION, *ROUTING], "attention": [*ATTENTION, *ROUTING]}
