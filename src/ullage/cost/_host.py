"""Host time beside the ops themselves: what modules, autograd, and the hooks, checks and dispatch of replays take.

On a CPU all of it shows as step time. On a CUDA device the host runs ahead of the kernels, so it is not counted there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ullage._stats import median
from ullage._torch import TorchDispatchMode, graph_task
from ullage.capture._timeline import OpCost
from ullage.runtime import checkpoint, recomputing_units

_SIZES = 1, 3  # layers of the blocks that are timed
_WARMUP, _ROUNDS, _FLOOR_CALLS = 3, 15, 200
_NAMES = tuple(f"host: {n}" for n in ("forward op", "backward op", "full", "full op", "selective", "selective op"))


@dataclass(frozen=True)
class HostCost:
    """Seconds.

    Attributes:
        forward_op: per op of a forward, replays included, beyond what the op takes when it is called alone.
        backward_op: per op of a backward.
        full: a full replay beyond its ops, what its forward did for it included.
        full_op: and per op of the unit's forward.
        selective: a selective replay.
        selective_op: and per op of the unit's forward, run or skipped.
    """

    forward_op: float = 0.0
    backward_op: float = 0.0
    full: float = 0.0
    full_op: float = 0.0
    selective: float = 0.0
    selective_op: float = 0.0

    def replays(self, selective: bool, replays: int, ops: int) -> float:
        """Of `replays` replays of forwards of `ops` ops in all."""
        if selective:
            return self.selective * replays + self.selective_op * ops
        return self.full * replays + self.full_op * ops

    def as_costs(self) -> dict[str, OpCost]:
        """As entries of a table of op costs."""
        return {k: OpCost(v, 0) for k, v in zip(_NAMES, astuple(self), strict=True)}


def host_cost_in(costs: dict[str, OpCost]) -> HostCost | None:
    """The one that `as_costs` put into a table of op costs."""
    return HostCost(*(costs[k].seconds for k in _NAMES)) if all(k in costs for k in _NAMES) else None


class _Layer(nn.Module):
    """A transformer block, so that there are views, attention, matmuls and elementwise ops as blocks have them."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Any:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Counts(TorchDispatchMode):
    """Ops of forward, backward and replays."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_backward = graph_task() != -1
        self.ops["again" if recomputing_units() else "backward" if in_backward else "forward"] += 1
        return func(*args, **(kwargs or {}))


def measure_host() -> HostCost:
    """Time tiny blocks on this CPU: plain, run twice, checkpointed in full and selectively, in turns; a quarter of a second."""
    full, selective, ops = [], [], []
    floor = _floor()
    for layers in _SIZES:
        block, x = _block(layers), torch.full((2, 8, 16), 0.5, requires_grad=True)
        plain, twice, replayed, selected = _medians(_ways(block), x)
        with _Counts() as counts:
            _step(_ways(block)[3], x)
        n, again, forward = counts.ops["forward"], counts.ops["again"], twice - plain
        full.append(max(replayed - twice, 0.0))
        selective.append(max(selected - plain - forward * again / n, 0.0))
        ops.append(n)
    forward_op = max(forward / n - floor, 0.0)
    backward_op = max((plain - forward) / counts.ops["backward"] - floor, 0.0)
    return HostCost(forward_op, backward_op, *_line(ops, full), *_line(ops, selective))


def _block(layers: int) -> nn.Module:
    """Its values are not drawn: other threads draw from the same generator."""
    with torch.device("meta"):
        block = nn.Sequential(*(_Layer() for _ in range(layers)))
    block.to_empty(device="cpu")
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.linspace(-0.2, 0.2, p.numel()).view_as(p))
    return block


def _ways(block: nn.Module) -> tuple[Callable[[Tensor], Any], ...]:
    def twice(x: Tensor) -> Any:
        block(x)
        return block(x)

    def replayed(x: Tensor) -> Any:
        return checkpoint(block, x)

    def selected(x: Tensor) -> Any:
        return checkpoint(block, x, keep="matmul_attention")

    return block, twice, replayed, selected


def _step(way: Callable[[Tensor], Any], x: Tensor) -> None:
    with torch.enable_grad():
        way(x).sum().backward()


def _floor() -> float:
    """Seconds of calling the smallest op alone, as op costs are measured."""
    x, op = torch.full((1, 4, 8), 0.5), torch.ops.aten.mul.Tensor
    start = time.thread_time()
    for _ in range(_FLOOR_CALLS):
        op(x, x)
    return (time.thread_time() - start) / _FLOOR_CALLS


def _medians(ways: tuple[Callable[[Tensor], Any], ...], x: Tensor) -> list[float]:
    times: list[list[float]] = [[] for _ in ways]
    for k in range(_WARMUP + _ROUNDS):
        for way, found in zip(ways, times, strict=True):
            start = time.thread_time()  # of this thread, which runs backward too: others on the machine do not show
            _step(way, x)
            if k >= _WARMUP:  # the first calls learn
                found.append(time.thread_time() - start)
    return [median(sorted(t)) for t in times]


def _line(ops: list[int], seconds: list[float]) -> tuple[float, float]:
    """Offset and slope per op of the line nearest to two measurements, neither below zero."""
    slope = (seconds[1] - seconds[0]) / (ops[1] - ops[0])
    offset = seconds[0] - slope * ops[0]
    if slope < 0:  # noise: the nearest line that is allowed is level, or goes through the origin
        return sum(seconds) / len(seconds), 0.0
    if offset < 0:
        return 0.0, sum(n * s for n, s in zip(ops, seconds, strict=True)) / sum(n * n for n in ops)
    return offset, slope
