"""Frozen linear layers whose weights are held in 4 bits, as QLoRA holds its base.

The format is that of Dettmers et al., QLoRA (2023, arXiv 2305.14314): NF4 in blocks of 64, a scale per block, and the scales in 8 bits in
blocks of 256: 0.516 bytes per weight. A weight is unpacked where it is used, in forward and in backward, and autograd saves only the
packed weight, as in bitsandbytes. torch's own ops unpack it here, with a tensor of indices that the kernel of bitsandbytes does not need.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK, SCALES = 64, 256  # weights per scale, scales per step
# quantiles of a normal distribution (the paper's appendix E), and the bounds between neighbours
_CODE = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
_BOUNDS = [(a + b) / 2 for a, b in zip(_CODE, _CODE[1:], strict=False)]


def _padded(values: Tensor, size: int) -> Tensor:
    return F.pad(values, (0, -values.numel() % size)).view(-1, size)


class Linear4bit(nn.Module):
    """A frozen linear layer with a packed weight.

    Args:
        layer: what it stands for; its bias stays as it is.
        weight: the weight, of shape out x in.
    """

    scales: Tensor
    steps: Tensor
    offset: Tensor
    code: Tensor

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.bias = weight.dtype, layer.bias
        blocks = _padded(weight.detach().reshape(-1).float(), BLOCK)
        scales = blocks.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny)
        found = torch.bucketize(blocks / scales[:, None], blocks.new_tensor(_BOUNDS)).to(torch.uint8).view(-1, 2)
        offset = scales.mean()
        rows = _padded(scales - offset, SCALES)
        steps = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / 127
        self.weight = nn.Parameter(found[:, 0] * 16 + found[:, 1], requires_grad=False)  # n / 2
        self.register_buffer("scales", (rows / steps).round_().to(torch.int8))  # n / 64
        self.register_buffer("steps", steps)
        self.register_buffer("offset", offset)
        self.register_buffer("code", blocks.new_tensor(_CODE))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, unpacked."""
        return _unpacked((self.out_features, self.in_features), dtype, *self._packed())

    def forward(self, x: Tensor) -> Tensor:
        """What the linear layer gives, in the weight's dtype or autocast's."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
        made: Tensor = _Multiply.apply(x.to(dtype), self.bias, (self.out_features, self.in_features), *self._packed())
        return made

    def _packed(self) -> tuple[Tensor, ...]:
        return self.weight, self.scales, self.steps, self.offset, self.code


def _unpacked(shape: tuple[int, int], dtype: torch.dtype, *packed: Tensor) -> Tensor:
    found, scales, steps, offset, code = packed
    pairs = torch.cartesian_prod(code, code).to(dtype)  # of the two weights in a byte
    weight = F.embedding(found.int(), pairs).view(-1, BLOCK)
    each = (scales * steps).add_(offset).view(-1)[: weight.shape[0]].to(dtype)
    return weight.mul_(each[:, None]).view(-1)[: shape[0] * shape[1]].view(shape)


class _Multiply(torch.autograd.Function):
    """`x @ weight.t() + bias` that saves the packed weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], *packed: Tensor) -> Tensor:
        """Unpack the weight and multiply."""
        ctx.shape = shape
        ctx.save_for_backward(*packed)
        return F.linear(x, _unpacked(shape, x.dtype, *packed), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Unpack it again."""
        return grad @ _unpacked(ctx.shape, grad.dtype, *ctx.saved_tensors), *[None] * 7
