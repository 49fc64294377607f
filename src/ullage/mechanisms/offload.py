"""offload: send a unit's saved tensors to host memory or disk, and bring them back for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ullage.mechanisms._mechanism import Mechanism, Offer, Option, TierView, UnitView, register
from ullage.runtime import Options, Site, run_offloaded
from ullage.runtime.ops._keep import TIERS


class Offload(Mechanism):
    """Send what a unit saves to a tier, host memory or disk, in its forward; bring it back before its backward.

    Use it where a fast link or disk is idle while the device computes: nothing runs again, and any unit may have it, also
    one that draws random numbers or runs collectives. Where transfers take longer than what computes beside them, the step
    waits for them; disks wear out.

    Source: Rhu et al., "vDNN", 2016 (arXiv:1602.08124).
    """

    action = "offload"
    forms = ("offload (any)", *(f"offload:{tier}" for tier in TIERS))
    policy = "offload"
    sends = True

    def parse(self, level: str) -> Option:
        """A tier."""
        if level not in TIERS:
            raise ValueError
        return Option(self.action, level)

    def covers(self, option: Option) -> bool:
        """Also levels of `select` of which some calls are offloaded."""
        return option.offloads

    def offers(self, unit: UnitView, tier: TierView | None) -> Offer:
        """The tier that there is."""
        return Offer((Option(self.action, tier.name),)) if tier is not None else Offer()

    def tier_of(self, level: str) -> str:
        """The level is the tier."""
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
        """Under saved-tensor hooks; Dynamo does not trace those, so `traced` keeps everything."""
        return run_offloaded(site, call, args, kwargs)


register(Offload())
OFFLOAD = {tier: Option(Offload.action, tier) for tier in TIERS}
