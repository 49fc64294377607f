"""What applying a plan needs of it. Plans are the planner's, which stands above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from ullage.mechanisms import UnitSettings


class DecisionToApply(Protocol):
    """The decision about one unit."""

    @property
    def unit(self) -> str:
        """The module's FQN."""

    @property
    def action(self) -> str:
        """The option's name."""

    @property
    def bytes_freed(self) -> int:
        """Bytes that it frees."""

    @property
    def buffers(self) -> list[str]:
        """Buffers that the unit's forward changes."""

    @property
    def input_elements(self) -> int:
        """Elements that the unit is given in the planned step."""

    def settings(self) -> UnitSettings:
        """Return the runtime's settings for the unit."""


class PlanToApply(Protocol):
    """A plan. Its forecasts and tiers are plain data of the planner's."""

    @property
    def decisions(self) -> Sequence[DecisionToApply]:
        """Of each unit."""

    @property
    def predicted(self) -> Any:
        """A `ullage.Forecast`."""

    @property
    def budget_bytes(self) -> int | None:
        """The budget, if there is one."""

    @property
    def tier(self) -> Any:
        """Where tensors are offloaded to, or None."""

    @property
    def disk(self) -> Any:
        """The tier if it is a disk, or None."""

    @property
    def host(self) -> Any:
        """The tier if it is pinned memory, or None."""

    @property
    def evaluation(self) -> list[str]:
        """Modules that were in evaluation mode."""

    @property
    def endurance(self) -> str:
        """The bytes that the plan writes to a disk, and its endurance, in a sentence."""

    @property
    def digest(self) -> str:
        """Of all that was decided."""

    def check_model(self, model: nn.Module) -> None:
        """Raise PlanMismatch unless it is the model that was planned for."""


def is_plan(value: object) -> bool:
    """Is it a plan, rather than something that was given in its place?"""
    return all(hasattr(type(value), name) for name in ("apply", "decisions", "check_model"))
