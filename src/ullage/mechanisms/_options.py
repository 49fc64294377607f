"""Options of a unit: keep everything, offload it, recompute everything, or keep selected ops' outputs and recompute the rest."""

from __future__ import annotations

from dataclasses import dataclass

from ullage.runtime import Place
from ullage.runtime._keep import TIERS, named_rule


@dataclass(frozen=True)
class Option:
    """One thing that can be done with a unit.

    Attributes:
        action: keep, recompute, select or offload.
        level: for select, what is kept: a level or single calls of ops, some of them in a tier; for offload, the tier.
        place: where the unit is among units that are rebuilt together; None where each is rebuilt alone.
    """

    action: str
    level: str = ""
    place: Place | None = None

    @property
    def name(self) -> str:
        """`keep`, `recompute`, `offload:TIER`, `select:LEVEL` or `select:CALLS`, such as `select:gelu[0]+mm[0,2]@disk`."""
        return f"{self.action}:{self.level}" if self.level else self.action

    @property
    def tier(self) -> str:
        """The tier that tensors are offloaded to, "host" or "disk"; "" without offloading."""
        if self.action == "offload":
            return self.level
        return self.level.rpartition("@")[2].partition("+")[0] if "@" in self.level else ""

    @property
    def offloads(self) -> bool:
        """Is anything offloaded?"""
        return bool(self.tier)


KEEP, RECOMPUTE = Option("keep"), Option("recompute")
OFFLOAD = {tier: Option("offload", tier) for tier in TIERS}


def option_from_name(name: str) -> Option:
    """The option a plan file names; ValueError for one this version does not know."""
    action, _, level = name.partition(":")
    if not level and action in ("keep", "recompute"):
        return Option(action)
    if action == "offload" and level in OFFLOAD:
        return OFFLOAD[level]
    if not level or action != "select":
        raise ValueError(name)
    try:
        named_rule(level)
    except ValueError as error:
        raise ValueError(f"{name} ({error})") from None
    return Option(action, level)
