"""A unit's option, with the facts that running it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ullage.mechanisms._mechanism import Option
from ullage.runtime import Options, Site


@dataclass(frozen=True)
class UnitSettings:
    """A unit's option, with the facts that running it needs.

    Attributes:
        option: the option.
        buffers: names, below the unit, of the buffers its forward changes.
        keeps_routing: the unit has routing or index outputs (topk, sort, ...), which are always kept.
    """

    option: Option
    buffers: tuple[str, ...] = ()
    keeps_routing: bool = False

    @cached_property
    def runtime_options(self) -> Options:
        """The runtime's options; made once, because every forward asks for them."""
        rule = self.option.mechanism.rule(self.option, self.keeps_routing)
        return Options(rule=rule, place=self.option.place)

    def run(
        self,
        site: Site,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_recompute: Callable[[], None] | None = None,
    ) -> Any:
        """Call `call(*args, **kwargs)` so that its activations are treated as the option says; see `Mechanism.run`."""
        return self.option.mechanism.run(site, self.runtime_options, call, args, kwargs, on_recompute)
