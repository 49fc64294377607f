"""The options of one call of a unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ullage.runtime.ops._keep import Rule
from ullage.runtime.unit._place import Place


@dataclass(frozen=True)
class Options:
    """How a unit is run; see `ullage.checkpoint`."""

    rule: Rule | None = None
    preserve_rng_state: bool = True
    determinism_check: str = "default"
    early_stop: bool = True
    context_fn: Callable[[], tuple[Any, Any]] | None = None
    debug: bool = False
    host_rng: bool = False
    place: Place | None = None
