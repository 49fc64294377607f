"""Predict which offloaded tensors backward asks for next.

Backward asks for the tensor that was offloaded last first. Inside one unit the order may differ: a replay asks first for what its
forward made first. So the unit's other tensors are predicted before those of other units. Tensors offloaded before the last
backward began belong to other graphs and are never predicted.
The runtime and the simulated step (`ullage.solver._channels`) use the same prediction.
"""

from __future__ import annotations

from collections.abc import Hashable

# Tensors predicted at once, so that a step of thousands of tensors has no long queue. The store bounds the bytes by its
# window, so the number matters only for small tensors.
MOST = 64


class Ahead:
    """Offloaded tensors, numbered in the order in which they were sent."""

    def __init__(self) -> None:
        self._senders: list[Hashable] = []
        self._firsts: list[int] = []  # per tensor, the first of its graph
        self._first = 0  # the first that was sent since the last backward
        # every tensor from this number on was predicted or asked for in this backward, or belongs to another graph
        self._front = 0
        self._named: set[int] = set()
        self._asked: set[int] = set()

    def forget_last(self) -> None:
        """Drop the last tensor: nobody holds it any more, and its number is used for the next one."""
        self._senders.pop()
        self._firsts.pop()

    def left(self, sender: Hashable) -> int:
        """Record that `sender` offloaded one more tensor, and return its number."""
        n = len(self._senders)
        self._first = n if self._asked else min(self._first, n)
        self._senders.append(sender)
        self._firsts.append(self._first)
        self._begin(n + 1)
        return n

    def asked(self, n: int) -> list[int]:
        """Record that backward asks for tensor `n`; return the numbers it asks for next, in order, without those returned before."""
        if n in self._asked or (n >= self._front and n not in self._named):
            self._begin(n + 1)
        self._asked.add(n)
        top, least = n + 1, max(n - MOST, self._firsts[n])
        while top < len(self._senders) and self._senders[top] == self._senders[n]:
            top += 1
        found = [k for k in range(top - 1, n, -1) if k not in self._named and k not in self._asked]
        found += range(min(self._front, n) - 1, least - 1, -1)
        self._front = min(self._front, least)
        self._named.update(found)
        return found

    def _begin(self, front: int) -> None:
        """Start another backward, in which no tensor before this number was predicted yet."""
        self._front = front
        self._named.clear()
        self._asked.clear()
