"""Options of a unit: keep everything, recompute everything, or keep selected ops' outputs and recompute the rest."""

from __future__ import annotations

from dataclasses import dataclass

from ullage.runtime import LEVELS


@dataclass(frozen=True)
class Option:
    """One thing that can be done with a unit: an action and, for select, a level."""

    action: str
    level: str = ""

    @property
    def name(self) -> str:
        """`keep`, `recompute` or `select:LEVEL`."""
        return f"{self.action}:{self.level}" if self.level else self.action


KEEP, RECOMPUTE = Option("keep"), Option("recompute")


def option_from_name(name: str) -> Option:
    """The option a plan file names; ValueError for one this version does not know."""
    action, _, level = name.partition(":")
    known = (action in ("keep", "recompute") and not level) or (action == "select" and level in LEVELS)
    if not known:
        raise ValueError(name)
    return Option(action, level)
