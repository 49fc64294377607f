"""A small tower of blocks, plans that have what it saves on disk, and its gradients."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

import ullage as ul

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
    model.tower_blocks = blocks  # type: ignore[assignment]
    return ul.Workload(model, torch.randn(8, 32, 64), loss=squares, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def squares(out: Tensor, _: Tensor) -> Tensor:
    return out.square().mean()


def offload(work: ul.Workload, at: Path, size: str = CAPACITY, **options: Any) -> ul.Plan:
    """All that may leave, on disk. A tower is planned once: plans for other directories are the same but for that."""
    blocks = getattr(work.model, "tower_blocks", None)
    if blocks is not None and not options:
        return _moved(_tower_plan(blocks, size), at)
    costs = {} if "profile" in options else {"costs": "roofline"}
    return ul.plan(work, policy="offload", disk_directory=at, disk_budget=size, **{**costs, **options})


def mixed(work: ul.Workload, at: Path, size: str = CAPACITY) -> ul.Plan:
    """Of three blocks one on disk, one recomputed, one with the outputs of its first matmul on disk, where they can be."""
    blocks = getattr(work.model, "tower_blocks", None)
    return _mixed(work, at, size) if blocks is None else _moved(_tower_plan(blocks, size, True), at)


@functools.cache
def _tower_plan(blocks: int, size: str, some: bool = False) -> ul.Plan:
    with tempfile.TemporaryDirectory() as at:
        if some:
            return _mixed(tower(blocks), Path(at), size)
        return offload(tower(blocks), Path(at), size, costs="roofline")


def _moved(plan: ul.Plan, at: Path) -> ul.Plan:
    assert plan.disk is not None
    return msgspec.structs.replace(plan, disk=msgspec.structs.replace(plan.disk, directory=str(at)))


def _mixed(work: ul.Workload, at: Path, size: str) -> ul.Plan:
    profile = ul.profile(work, costs="roofline")
    able = {d.unit for d in ul.plan(work, policy="every_block", profile=profile).decisions if d.action == "recompute"}
    everything = offload(work, at, size, profile=profile)
    units = [d.unit for d in everything.decisions if d.action == "offload:disk"]
    pins = {u: "recompute" for u in units[1::3] if u in able}
    levels = ["addmm[0]@disk", "mm[0]@disk", "convolution[0]@disk", "bmm[0]@disk"]
    for u in units[2::3]:
        for level in levels:
            try:
                offload(work, at, size, profile=profile, pin={u: f"select:{level}"})
            except ul.ArgumentError:
                continue
            pins[u] = f"select:{level}"
            levels = [level, *(x for x in levels if x != level)]  # blocks are often alike
            break
    return offload(work, at, size, profile=profile, pin=pins)


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
