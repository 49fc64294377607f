"""A small tower of blocks, plans that have what it saves on disk, and its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ullage as ul
from ullage.mechanisms import OFFLOAD

CAPACITY = "32MiB"


LARGE = "256MiB"  # of whole families


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def tower(blocks: int = 4) -> ul.Workload:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks)))
    return ul.Workload(model, torch.randn(8, 32, 64), loss=squares, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def squares(out: Tensor, _: Tensor) -> Tensor:
    return out.square().mean()


def offload(work: ul.Workload, at: Path, size: str = CAPACITY, **options: Any) -> ul.Plan:
    return ul.plan(work, policy="offload", disk_directory=at, disk_budget=size, **options)


def mixed(work: ul.Workload, at: Path, size: str = CAPACITY) -> ul.Plan:
    """Of three blocks one on disk, one recomputed, one with the outputs of its first matmul on disk, where they can be."""
    able = {d.unit for d in ul.plan(work, policy="every_block").decisions if d.action == "recompute"}
    units = [d.unit for d in offload(work, at, size).decisions if d.action == OFFLOAD["disk"].name]
    pins = {u: "recompute" for u in units[1::3] if u in able}
    for u in units[2::3]:
        for level in ("addmm[0]@disk", "mm[0]@disk", "convolution[0]@disk", "bmm[0]@disk"):
            try:
                offload(work, at, size, pin={u: f"select:{level}"})
            except ul.ArgumentError:
                continue
            pins[u] = f"select:{level}"
            break
    return offload(work, at, size, pin=pins)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def backward(model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward(**options)
    return gradients(model)


def store_of(handle: ul.Handle) -> Any:
    assert handle._store is not None
    handle._store.flush()  # what is dropped while a thread writes it is there until the thread sees that
    return handle._store
