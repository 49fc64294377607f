"""Kernels that fill a tensor after autograd has saved it, so that it has its values only when the op has run.

torch's schemas tell which ops do so: those with an argument that the op writes to and that its autograd node saves. The schemas of
the old batch norms don't mark the arguments they write to, so those are known by name.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ullage._torch import all_schemas, node_classes, sequence_number, tree_flatten
from ullage.runtime.tensors._memory import hides_graph

_STATISTICS = ("running_mean", "running_var")
_SAVED = "_raw_saved_"


def mark() -> int:
    """Return the number of autograd's next node on this thread."""
    return int(sequence_number())


@functools.cache
def late_nodes() -> dict[str, bool]:
    """Return the autograd nodes of such ops by name, each with: are all the tensors that it saves saved before the kernel runs?"""
    nodes = defaultdict(list)
    for name in dir(node_classes):
        nodes[name.rstrip("0123456789")].append(name)
    found: dict[str, bool] = {}
    for schema in all_schemas():
        name = schema.name.removeprefix("aten::")
        of_op = nodes.get("".join(map(_capital, name.split("_"))) + "Backward")
        if of_op is None or name == schema.name or name.endswith("backward"):
            continue
        # an in-place op's `self` is saved as a copy, or after the kernel has run
        written = {a.name for a in schema.arguments if _is_written(a) and not (name.endswith("_") and a.name == "self")}
        arguments = {a.name for a in schema.arguments} if written else set()
        for node in of_op:
            saved = _saved_by(node) if written else set()
            if saved & written:
                found[node] = found.get(node, False) or saved <= arguments
    return found


def _is_written(argument: Any) -> bool:
    alias = argument.alias_info
    return argument.name in _STATISTICS or (alias is not None and alias.is_write and not argument.is_out)


def _capital(part: str) -> str:
    return part[:1].upper() + part[1:]


def _saved_by(node: str) -> set[str]:
    # results are saved when the kernel has run; they are named "result", "result1", or as a return value
    return {n.removeprefix(_SAVED) for n in dir(getattr(node_classes, node)) if n.startswith(_SAVED)}


def late_kernels(out: Any, since: int) -> dict[str, bool]:
    """Return the `late_nodes` among the nodes that made a unit's output since the mark."""
    found = {}
    late = late_nodes()
    # a view that torch refuses to look at is handed on by its caller; what its base was computed from can be looked at
    outs = [t._base if hides_graph(t) else t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
    todo = [t.grad_fn for t in outs if t is not None]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or node._sequence_nr() < since:
            continue
        seen.add(node)
        name = node.name()
        if name in late:
            found[name] = late[name]
        todo += [inner for inner, _ in node.next_functions]
    return found


def is_fresh(x: Tensor) -> bool:
    """May a kernel that has not run yet fill this tensor? Only if it is in no graph and nobody has written to it."""
    return not x.requires_grad and x._version == 0 and x.is_floating_point()


def may_be_unfilled(store: Mapping[int, Any], notes: Sequence[tuple[Any, ...]], i: int) -> bool:
    """May the op that saves tensor `i` last fill noise after that?"""
    return any(isinstance(store.get(k), Tensor) and _like_noise(store[k], notes, k) for k in (i - 1, i))


def unset(saved: Mapping[int, tuple[Any, int]], notes: Sequence[tuple[Any, ...]]) -> set[int]:
    """Return the indices of tensors that may be noise no kernel has set, in a call that draws nothing: RReLU saves it in evaluation, too."""
    return {i for i, (x, _) in saved.items() if isinstance(x, Tensor) and _like_noise(x, notes, i)}


def _like_noise(x: Tensor, notes: Sequence[tuple[Any, ...]], i: int) -> bool:
    """Is it fresh, and of the same shape and dtype as the tensor saved next? `rrelu` saves its noise just before such a tensor."""
    if not is_fresh(x) or i + 1 >= len(notes):
        return False
    shape, _, dtype, _ = notes[i]
    return bool(notes[i + 1][0] == shape and notes[i + 1][2] == dtype)
