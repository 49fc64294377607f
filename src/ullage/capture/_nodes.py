"""Assign a step's ops to autograd nodes, and note each node's inputs.

Some of autograd's formulas run other ops if a tensor is a subclass or a dispatch mode is active, and in a capture both are true:
out of place instead of in place, `masked_fill` instead of indexing. So a node can be measured as a whole on real tensors
(`ullage.cost`). For that the trace records which op made it and which gradients it was given.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ullage._torch import autograd_node, graph_task
from ullage.capture._op_values import MANY
from ullage.capture._trace import NodeRun, Trace, spec_of


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an op's arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, MANY):
        for v in value:
            yield from tensors_in(v)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


class NodeRuns:
    """Notes the runs of a step's nodes into its trace."""

    def __init__(self) -> None:
        # by sequence: the op's signature; which arguments require grad
        self._made: dict[int, tuple[int, tuple[bool, ...]]] = {}
        self._seen = -1  # the last graph task whose nodes give notice
        self._given: dict[int, tuple[Any, ...]] = {}  # by sequence, of nodes that have begun and run no op yet
        self._open: NodeRun | None = None
        self._ended = -1  # sequence of the node whose gradients the engine adds up

    def made(self, sequence: int, signature: int, args: Any, kwargs: Any) -> None:
        """Note that an op of a forward ran: the first one to report a sequence number made the node with that number."""
        if sequence not in self._made and torch.is_grad_enabled():
            needs = tuple([t.requires_grad for t in tensors_in((args, kwargs))])
            if any(needs):
                self._made[sequence] = signature, needs

    def begin(self) -> None:
        """Before an op of a backward, hook the nodes of its graph to note the gradients that they are given."""
        task = graph_task()
        if task == self._seen:
            return
        first = autograd_node()
        if first is None:
            return
        self._seen, self._open, self._ended = task, None, -1
        self._given.clear()
        todo, seen = [n for n, _ in first.next_functions], {first}
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
            sequence = node._sequence_nr()
            if sequence in self._made:
                node.register_prehook(functools.partial(self._enter, sequence))

    def _enter(self, sequence: int, grads: Sequence[Tensor | None]) -> None:
        self._given = {sequence: tuple(map(spec_of, grads))}

    def end(self) -> None:
        """End the run: the engine adds up the gradients that the node returned."""
        if self._open is not None:
            self._ended, self._open = self._open.sequence, None

    def ran(self, trace: Trace, node: Any, sequence: int) -> None:
        """Add the op that is about to be recorded to the run of its node."""
        if sequence == self._ended:
            return
        run = self._open
        if run is None or run.sequence != sequence:
            made = self._made.get(sequence)
            if made is None or torch.is_grad_enabled():  # under create_graph a formula runs other ops, see above
                self._open = None
                return
            run = self._open = NodeRun(node.name(), sequence, made[0], made[1], self._given.pop(sequence, None))
            trace.nodes.append(run)
        run.ops.append(len(trace.signature))
