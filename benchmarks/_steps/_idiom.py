"""The registry of idioms, and the small models that most of them train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul

WIDTH, ROWS, CLASSES = 32, 64, 5


@dataclass(frozen=True)
class Idiom:
    """One way to write a step: its name and kind, a function that makes the workload, whether the step reads values."""

    name: str
    kind: str
    make: Callable[[], ul.Workload]
    reads: bool


IDIOMS: dict[str, Idiom] = {}


def idiom(kind: str, reads: bool = False) -> Callable[[Callable[[], ul.Workload]], Callable[[], ul.Workload]]:
    """Decorate a function that returns a workload: its name is the idiom's."""

    def register(make: Callable[[], ul.Workload]) -> Callable[[], ul.Workload]:
        name = make.__name__.replace("_", " ")
        assert name not in IDIOMS, name
        IDIOMS[name] = Idiom(name, kind, make, reads)
        return make

    return register


class Block(nn.Module):
    """A residual block of two layers, which has something to save by recomputing."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    """Blocks and a head."""

    def __init__(self, blocks: int = 2, out: int = CLASSES) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def net(blocks: int = 2, out: int = CLASSES, seed: int = 0) -> Net:
    """A model with weights that a seed determines."""
    torch.manual_seed(seed)
    return Net(blocks, out)


def xs(seed: int = 1, rows: int = ROWS) -> Tensor:
    """Inputs."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def ys(rows: int = ROWS) -> Tensor:
    """Labels."""
    return torch.arange(rows) % CLASSES


def square(output: Any, batch: Any) -> Tensor:
    """A loss of the output alone."""
    loss: Tensor = output.float().square().mean()
    return loss


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """An instance, as scripts make it."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
