"""Host time of a replay: what hooks, checks and dispatch in Python add to the ops that run again.

On a CPU all of it shows as step time. On a CUDA device the host runs ahead of the kernels, so it is not counted there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ullage.capture._timeline import OpCost
from ullage.runtime import checkpoint

_SIZES = 2, 8  # layers of the blocks that are timed
_OPS_PER_LAYER = 8  # native_layer_norm, view, t, addmm, view; gelu; mul, add
_ROUNDS = 15
_NAMES = "full replay", "full replay, per op", "selective replay", "selective replay, per op"


@dataclass(frozen=True)
class ReplayCost:
    """Seconds that one replay adds beyond its ops, forward's part included.

    Attributes:
        full: a full replay.
        full_op: and per op of the unit's forward.
        selective: a selective replay.
        selective_op: and per op of the unit's forward, run or skipped.
    """

    full: float = 0.0
    full_op: float = 0.0
    selective: float = 0.0
    selective_op: float = 0.0

    def seconds(self, selective: bool, replays: int, ops: int) -> float:
        """Of `replays` replays of forwards of `ops` ops in all."""
        if selective:
            return self.selective * replays + self.selective_op * ops
        return self.full * replays + self.full_op * ops

    def as_costs(self) -> dict[str, OpCost]:
        """As entries of a table of op costs."""
        return {k: OpCost(v, 0) for k, v in zip(_NAMES, astuple(self), strict=True)}


def replay_cost_in(costs: dict[str, OpCost]) -> ReplayCost | None:
    """The one that `as_costs` put into a table of op costs."""
    return ReplayCost(*(costs[k].seconds for k in _NAMES)) if all(k in costs for k in _NAMES) else None


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.gelu(self.linear(self.norm(x))) * 0.5


def measure_replays() -> ReplayCost:
    """Time tiny blocks on this CPU: plain, run twice, checkpointed in full and selectively, in turns; a tenth of a second or two."""
    full, selective = [], []
    with torch.random.fork_rng(devices=[]):
        for layers in _SIZES:
            block = nn.Sequential(*(_Layer() for _ in range(layers)))
            x = torch.full((1, 4, 8), 0.5, requires_grad=True)

            def twice(x: Tensor, block: nn.Module = block) -> Any:
                block(x)
                return block(x)

            def replayed(x: Tensor, block: nn.Module = block) -> Any:
                return checkpoint(block, x)

            def selected(x: Tensor, block: nn.Module = block) -> Any:
                return checkpoint(block, x, keep="matmul_attention")

            rerun, once, chosen = _medians((twice, replayed, selected), x)
            full.append(max(once - rerun, 0.0))
            selective.append(max(chosen - rerun, 0.0))
    return ReplayCost(*_line(full), *_line(selective))


def _line(seconds: list[float]) -> tuple[float, float]:
    """Offset and slope per op through two measurements."""
    few, many = (n * _OPS_PER_LAYER for n in _SIZES)
    slope = max((seconds[1] - seconds[0]) / (many - few), 0.0)
    return max(seconds[0] - slope * few, 0.0), slope


def _medians(steps: tuple[Callable[[Tensor], Any], ...], x: Tensor) -> list[float]:
    times: list[list[float]] = [[] for _ in steps]
    for k in range(_ROUNDS + 3):
        for step, found in zip(steps, times, strict=True):
            start = time.thread_time()  # of this thread, which runs backward too: others on the machine do not show
            with torch.enable_grad():
                step(x).sum().backward()
            if k >= 3:  # the first calls learn
                found.append(time.thread_time() - start)
    return [statistics.median(t) for t in times]
