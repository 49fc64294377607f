"""Which tensors that have left a backward will ask for next.

What left last is asked for first. Inside a unit the order may be another one, as a replay asks for what its forward made
first: so the rest of what the unit sent comes before what others sent. What left before the last backward began is of other graphs.
The runtime and the simulation of a step (`ullage.solver._channels`) both go by it.
"""

from __future__ import annotations

from collections.abc import Hashable

MOST = 64  # asked for ahead, so that a step of thousands of tensors has no long queue


class Ahead:
    """Tensors by number, in the order in which they left."""

    def __init__(self) -> None:
        self._senders: list[Hashable] = []
        self._firsts: list[int] = []  # per tensor, the first of its graph
        self._first = 0  # the first that left since the last backward
        # from this number on all have been named or asked for in this backward, or are of another graph
        self._front = 0
        self._named: set[int] = set()
        self._asked: set[int] = set()

    def forget_last(self) -> None:
        """The last one is gone; its number is used again."""
        self._senders.pop()
        self._firsts.pop()

    def left(self, sender: Hashable) -> int:
        """One more has left; returns its number."""
        n = len(self._senders)
        self._first = n if self._asked else min(self._first, n)
        self._senders.append(sender)
        self._firsts.append(self._first)
        self._begin(n + 1)
        return n

    def asked(self, n: int) -> list[int]:
        """One is asked for; returns the numbers of those that will be next and were not named before, in order."""
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
        """Another backward: nothing before this number has been named in it."""
        self._front = front
        self._named.clear()
        self._asked.clear()
