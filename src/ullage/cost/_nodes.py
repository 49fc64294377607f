"""Run an autograd node alone, on real tensors, for the bytes it allocates whichever branch its formula takes.

Ops of a formula are measured one by one from a capture's log (`_measure`). That log is of the way that the formula takes on
tensor subclasses; where a real one takes another, the sum over the log is wrong, and the node is measured instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ullage._torch import tree_map
from ullage.capture._nodes import tensors_in
from ullage.capture._timeline import OpCost
from ullage.capture._trace import NodeRun, Signature, spec_of
from ullage.cost._made import Filling, arguments, fillings, make_tensor, measurable
from ullage.cost._measure import most_of, peak_and_made, undrawn
from ullage.measure._turns import one_at_a_time


def measure_node(run: NodeRun, made_by: Signature, ops: Iterable[Any]) -> OpCost | None:
    """Return the most bytes that one run of a node allocates at any moment, and its outputs' sizes; None if it can't be run alone.

    Args:
        run: the run of the node, with its gradients.
        made_by: the forward op that made the node.
        ops: the ops of its formula, as captured.
    """

    def alone(filling: Filling) -> tuple[int, tuple[int, ...]]:
        outs, grads, leaves = _made(run, made_by, filling)

        def backward() -> Sequence[Tensor | None]:
            return torch.autograd.grad(outs, leaves, grads, retain_graph=True, allow_unused=True)

        backward()  # a first run, because bytes that a kernel allocates once per process are not part of a run
        return peak_and_made(backward, (outs, grads, leaves), outs[0].device.type)

    if not measurable(made_by):
        return None
    try:
        with one_at_a_time(), undrawn(made_by):
            peak, returned, bounds = most_of(alone, fillings(made_by, [made_by.func, *ops]))
    except Exception:  # made-up values won't do: the ops of the log stand in
        return None
    return OpCost(0.0, peak, returned, bounds)


def _made(run: NodeRun, made_by: Signature, filling: Filling) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs of a node of this kind that have a gradient, these gradients, and what to differentiate with respect to.

    Raises:
        ValueError: the op makes another node, or other outputs than in the step.
    """
    args, kwargs = arguments(made_by, filling)
    tensors = tensors_in((args, kwargs))
    leaves = [t.requires_grad_() for t, needs in zip(tensors, run.needs, strict=True) if needs]
    with torch.enable_grad():
        if made_by.func._schema.is_mutable:  # a leaf that requires grad is not written
            args, kwargs = tree_map(_not_leaf, (args, kwargs))
        outs = list(tensors_in(made_by.func(*args, **kwargs)))
    made = {t.output_nr: t for t in outs if t.grad_fn is not None}
    shapes = [tuple(t.shape) for t in outs]
    if not made or {_name(t) for t in made.values()} != {run.name} or shapes != [o.shape for o in made_by.outputs]:
        raise ValueError(f"{run.name}: another node")
    given = run.grads if run.grads is not None else (spec_of(made[min(made)]),)
    pairs = [(made[k], make_tensor(g)) for k, g in enumerate(given) if g is not None]
    return [t for t, _ in pairs], [g for _, g in pairs], leaves


def _not_leaf(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.requires_grad else value


def _name(tensor: Tensor) -> str:
    return tensor.grad_fn.name() if tensor.grad_fn is not None else ""
