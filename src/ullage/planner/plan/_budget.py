"""The bytes that a step may use, as one value that every part of the planner is given unchanged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The bytes that a plan stays within.

    Attributes:
        total: the budget, in bytes, that messages and plans name.
        reserve: bytes of it that stay free: the headroom.
    """

    total: int
    reserve: int = 0

    @property
    def room(self) -> int:
        """The largest peak that a step may have."""
        return self.total - self.reserve
