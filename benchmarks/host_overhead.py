"""Host time that checkpointing adds per block and step, ullage's runtime beside its peers, in one process.

`python benchmarks/host_overhead.py [--rounds 40]` writes results/host_overhead.json and the table results/host_overhead.md.

24 transformer blocks per model (pre-norm, attention, MLP), one thread, tiny blocks, so that host time is what is seen.
Contenders take turns, one step each per round; a number is the difference of medians to the plain step, per block. `bare
re-run` runs every block's forward once more and drops it: what any recomputation has to pay. `net` is what is added beyond
that. `bare hooks` is the floor of the design: saved-tensor hooks that check nothing. torch_remat's selective regions are left out: with torch 2.13 version 0.2.2 fails on a private function that it misses. Peaks are the allocator's
record of one step of a larger block (d=256, T=256), where bytes are what is seen.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_remat
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from _machine import machine

import ullage as ul
from ullage.measure._allocator import record_allocations
from ullage.runtime import ATTENTION, MATMUL

BLOCKS = 24
SIZES = {"d=16, T=8": (16, 8), "d=32, T=16": (32, 16), "d=64, T=32": (64, 32)}
LARGE = (256, 256)
Wrap = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, d: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (batch, sequence, d) in and out."""
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _twice(block: nn.Module, x: Tensor) -> Tensor:
    block(x)
    return block(x)


class _Stop(BaseException):
    pass


def _bare_hooks(block: nn.Module, x: Tensor) -> Tensor:
    """The least that saved-tensor hooks can do: count, re-run, collect. No check, no generator, no state: not sound."""
    saved: dict[int, Tensor] = {}
    count = 0
    held = x.detach()

    def pack(_: Tensor) -> int:
        nonlocal count
        count += 1
        return count - 1

    def unpack(i: int) -> Tensor:
        if i not in saved:
            again()
        return saved.pop(i)

    def again() -> None:
        found: list[Tensor] = []

        def collect(t: Tensor) -> int:
            found.append(t)
            if len(found) == count:
                raise _Stop
            return len(found) - 1

        leaf = held.detach().requires_grad_(x.requires_grad)
        try:
            with saved_tensors_hooks(collect, lambda i: None), torch.enable_grad():  # type: ignore[arg-type,return-value]
                block(leaf)
        except _Stop:
            pass
        saved.update(enumerate(found))
        found.clear()

    with saved_tensors_hooks(pack, unpack):
        return block(x)  # type: ignore[no-any-return]


CONTENDERS: dict[str, Wrap] = {
    "plain": lambda block, x: block(x),
    "bare re-run": _twice,
    "bare hooks, unchecked": _bare_hooks,
    "torch checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "torch_remat": lambda block, x: torch_remat.checkpoint()(block)(x),
    "ullage full": lambda block, x: ul.checkpoint(block, x),
    "torch SAC": lambda block, x: checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, [*MATMUL, *ATTENTION]),
    ),
    "ullage selective": lambda block, x: ul.checkpoint(block, x, keep="matmul_attention"),
}


def step(model: nn.ModuleList, x: Tensor, wrap: Wrap) -> None:
    """One forward and backward."""
    for block in model:
        x = wrap(block, x)
    x.sum().backward()
    model.zero_grad(set_to_none=True)


def medians(size: tuple[int, int], rounds: int) -> dict[str, float]:
    """Median seconds of a step per contender, turns taken round by round."""
    d, t = size
    torch.manual_seed(0)
    model, x = nn.ModuleList(Block(d) for _ in range(BLOCKS)), torch.randn(2, t, d)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for wrap in CONTENDERS.values():
        for _ in range(5):
            step(model, x, wrap)
    for _ in range(rounds):
        for name, wrap in CONTENDERS.items():
            start = time.thread_time()  # of this thread, which runs backward too: others on the machine do not show
            step(model, x, wrap)
            times[name].append(time.thread_time() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def peaks() -> dict[str, int]:
    """Allocator's record of a step's peak, in bytes above what is there before it."""
    d, t = LARGE
    torch.manual_seed(0)
    model, x = nn.ModuleList(Block(d) for _ in range(8)), torch.randn(4, t, d)
    found = {}
    for name, wrap in CONTENDERS.items():
        for _ in range(3):
            step(model, x, wrap)
        sizes = [e.nbytes for e in record_allocations(functools.partial(step, model, x, wrap))]
        found[name] = max(accumulate(sizes))
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["Microseconds of host time added per block and step; net of the bare re-run in brackets.", ""]
    lines += ["| | " + " | ".join(results["sizes"]) + " | peak, MiB |", "|---|" + "---:|" * (len(SIZES) + 1)]
    for name in CONTENDERS:
        cells = []
        for size in results["sizes"].values():
            added, bare = size[name] - size["plain"], size["bare re-run"] - size["plain"]
            net = f" ({(added - bare) * 1e6:.0f})" if name not in ("plain", "bare re-run") else ""
            cells.append(f"{added * 1e6:.0f}{net}")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {results['peaks'][name] / 2**20:.1f} |")
    lines += [
        "",
        "| net, ratio | " + " | ".join(results["sizes"]) + " | target |",
        "|---|" + "---:|" * (len(SIZES) + 1),
    ]
    for ours, theirs, target in (("ullage full", "torch checkpoint", 0.45), ("ullage selective", "torch SAC", 0.40)):
        cells = [f"{_net(s, ours) / _net(s, theirs):.2f}" for s in results["sizes"].values()]
        lines.append(f"| {ours} / {theirs} | " + " | ".join(cells) + f" | {target:.2f} |")
    return "\n".join(lines) + "\n"


def _net(size: dict[str, float], name: str) -> float:
    return size[name] - size["bare re-run"]


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "sizes": {}}
    for name, size in SIZES.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        results["sizes"][name] = {n: t / BLOCKS for n, t in medians(size, args.rounds).items()}
    results["peaks"] = peaks()
    text = table(results)
    if not args.no_write:
        (HERE / "results" / "host_overhead.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "results" / "host_overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
