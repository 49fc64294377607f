"""The bytes that a step may use, as one value that every part of the planner is given unchanged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What a plan was asked to stay within.

    Attributes:
        total: the budget, in bytes, that messages and plans name.
        reserve: of these, bytes that stay free: the headroom.
    """

    total: int
    reserve: int = 0

    @property
    def room(self) -> int:
        """What a step's peak may come to."""
        return self.total - self.reserve
