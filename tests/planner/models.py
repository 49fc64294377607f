"""Small models of which one thing holds the peak."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from tests.zoo import text_ids


class Mlp(nn.Module):
    """x + down(gelu(up(x))): `wide` is what its backward holds."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Pair(nn.Module):
    """Two of them: a unit that finer ones would split."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.first, self.second = Mlp(width, wide), Mlp(width, wide)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Tower(nn.Module):
    """Blocks on float inputs; the mean of the squares is the loss."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


ROWS, WIDTH, VOCABULARY = 2048, 16, 1024
LOGITS = ROWS * VOCABULARY * 4  # bytes


class HugeHead(nn.Module):
    """Two thin blocks and a head whose logits are far larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Mlp(WIDTH, 2 * WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.hidden(ids)), ids)


class ChunkedHead(HugeHead):
    """The same loss over chunks of rows, each with its backward."""

    def forward(self, ids: Tensor) -> Tensor:
        return _LinearCrossEntropy.apply(self.hidden(ids), self.head.weight, ids)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        loss, grad_x, grad_weight = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(weight)
        for rows in torch.arange(len(x)).chunk(8):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = x[part] @ weight.t()
            logp = F.log_softmax(logits, -1)
            del logits
            loss += F.nll_loss(logp, ids[part], reduction="sum")
            probabilities = logp.exp()
            grad = probabilities.scatter_add(1, ids[part, None], torch.full((len(rows), 1), -1.0))
            del probabilities, logp
            grad /= len(x)
            grad_x[part] = grad @ weight
            grad_weight.addmm_(grad.t(), x[part])
            del grad
        ctx.save_for_backward(grad_x, grad_weight)
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None


def head(model: type[HugeHead]) -> ul.Workload:
    torch.manual_seed(0)
    return ul.Workload(model(), text_ids(1, ROWS)[0])


def weights(**options: Any) -> ul.Workload:
    """Large weights, next to no activations: the optimizer holds the peak."""
    torch.manual_seed(0)
    model = Tower(*(Mlp(128, 256) for _ in range(4)))
    return ul.Workload(model, torch.ones(2, 128), optimizer=lambda p: torch.optim.AdamW(p, **options))


def wide() -> ul.Workload:
    """Blocks of two halves each; what a block makes in its own backward is far more than what lies between blocks."""
    torch.manual_seed(0)
    return ul.Workload(Tower(*(Pair(16, 256) for _ in range(4))), torch.randn(1024, 16))


def tower(blocks: int = 6) -> ul.Workload:
    """Equal blocks with next to no weights: keep, select and recompute differ by a MiB each."""
    torch.manual_seed(0)
    return ul.Workload(Tower(*(Mlp(16, 256) for _ in range(blocks))), torch.randn(1024, 16))
