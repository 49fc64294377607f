"""Options of a unit: keep everything, recompute everything, or keep selected ops' outputs and recompute the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

aten = torch.ops.aten


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

_names = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _flash_attention_forward "
    "_efficient_attention_forward"
)
ATTENTION = {getattr(aten, n).default for n in _names.split() if hasattr(aten, n)}
MATMUL = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
MATMUL |= {op.default for n in ("_grouped_mm", "_scaled_mm") if (op := getattr(aten, n, None)) is not None}
ROUTING = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argmax.default}
ROUTING |= {aten.nonzero.default, aten.multinomial.default, aten.max.dim, aten.min.dim}

# From the most saved bytes to the least. Every second matmul is torchtitan's default (its own comment calls it
# arbitrary); it is offered as one level among others and chosen only where the solver finds it best.
SELECT_LEVELS = {
    "matmul_attention": "keep the outputs of matmuls, convolutions and attention",
    "half_matmul_attention": "keep the outputs of every second matmul or convolution and of attention",
    "attention": "keep the outputs of attention",
}


def option_from_name(name: str) -> Option:
    """The option a plan file names; ValueError for one this version does not know."""
    action, _, level = name.partition(":")
    known = (action in ("keep", "recompute") and not level) or (action == "select" and level in SELECT_LEVELS)
    if not known:
        raise ValueError(name)
    return Option(action, level)


class SavePolicy:
    """A selective-checkpointing policy of torch for one option; counts matmuls, forward and replay apart."""

    def __init__(self, option: Option) -> None:
        self.option = option
        self._seen = {False: 0, True: 0}

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Say whether this op's output is kept."""
        return CheckpointPolicy.MUST_SAVE if self._keeps(ctx.is_recompute, op) else CheckpointPolicy.PREFER_RECOMPUTE

    def _keeps(self, is_recompute: bool, op: Any) -> bool:
        if op in ROUTING:
            return True
        level = self.option.level
        if op in ATTENTION:
            return bool(level)
        if op not in MATMUL or level in ("", "attention"):
            return False
        self._seen[is_recompute] += 1
        return level == "matmul_attention" or self._seen[is_recompute] % 2 == 1
