"""Kernels that fill a tensor after autograd has saved it: what is saved has its values only when the op has run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

UNTIL_THE_END = "RreluWithNoiseBackward"  # all it saves is saved before its kernel runs
# a running statistic that they write; what they save last is there only when the kernel has run
_STATISTICS = ("NativeBatchNormBackward", "NativeBatchNormLegitBackward", "BatchNormWithUpdateBackward")
_NODES = (UNTIL_THE_END, *_STATISTICS)


def mark() -> int:
    """The number of autograd's next node on this thread."""
    return int(torch._C._autograd._get_sequence_nr())


def late_kernels(out: Any, since: int) -> set[str]:
    """Names of nodes of such ops among those that made a unit's output since the mark."""
    found = set()
    todo = [t.grad_fn for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or node._sequence_nr() < since:
            continue
        seen.add(node)
        if node.name().startswith(_NODES):
            found.add(node.name().rstrip("0123456789"))
        todo += [inner for inner, _ in node.next_functions]
    return found
