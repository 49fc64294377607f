"""offload: send a unit's saved tensors to host memory or disk, and bring them back for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ullage.mechanisms._mechanism import Mechanism, Offer, Option, TierView, UnitView, register
from ullage.runtime import Options, Site, run_offloaded
from ullage.runtime.ops._keep import TIERS


class Offload(Mechanism):
    """Send a unit's saved tensors to a tier, host memory or disk, in its forward; bring them back before its backward.

    Use it if a fast link or disk is idle while the device computes: nothing runs again, and any unit may have it, also one
    that draws random numbers or runs collectives. If transfers take longer than the compute beside them, the step waits for
    them. Disks wear out.

    Source: Rhu et al., "vDNN", 2016 (arXiv:1602.08124).
    """

    action = "offload"
    forms = ("offload (any)", *(f"offload:{tier}" for tier in TIERS))
    policy = "offload"
    sends = True

    def parse(self, level: str) -> Option:
        """Read a tier."""
        if level not in TIERS:
            raise ValueError
        return Option(self.action, level)

    def covers(self, option: Option) -> bool:
        """Cover also levels of `select` with some calls offloaded."""
        return option.offloads

    def offers(self, unit: UnitView, tier: TierView | None) -> Offer:
        """Offer the tier that there is."""
        return Offer((Option(self.action, tier.name),)) if tier is not None else Offer()

    def tier_of(self, level: str) -> str:
        """Return the level, which is the tier."""
        return level

    def run(
        self,
        site: Site,
        options: Options,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_recompute: Callable[[], None] | None,
    ) -> Any:
        """Run under saved-tensor hooks; Dynamo does not trace those, so `traced` keeps everything."""
        return run_offloaded(site, call, args, kwargs)


register(Offload())
