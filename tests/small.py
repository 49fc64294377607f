"""The smallest things that still have what is tested: for tests of behaviour, not of numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from tests.zoo import adamw, text_ids
from ullage.demo import GPT


def next_byte(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tiny(batch: int = 4, autocast: torch.dtype | None = None) -> ul.Workload:
    """Two blocks with dropout, 32 bytes of English, AdamW."""
    torch.manual_seed(0)
    return ul.Workload(
        GPT(layers=2, width=32, heads=2, seq=64),
        text_ids(batch, 32),
        loss=next_byte,
        optimizer=adamw,
        autocast=autocast,
    )


class Blocks(nn.Module):
    """Blocks without a matmul: planned in a second."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.GELU()) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def blocks(batch: int = 128, layers: int = 3, width: int = 64) -> ul.Workload:
    return ul.Workload(Blocks(layers, width), torch.ones(batch, width))
