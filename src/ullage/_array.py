"""A tensor's memory as a numpy array.

Not by `Tensor.numpy`: that forbids the storage to be resized ever after, and FSDP resizes those of parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class _Interface:
    def __init__(
        self, tensor: Tensor, shape: tuple[int, ...], kind: str, strides: tuple[int, ...] | None = None
    ) -> None:
        self._tensor = tensor  # the array holds this object, and so the memory
        data = (tensor.data_ptr(), False)
        self.__array_interface__ = {"shape": shape, "typestr": kind, "data": data, "strides": strides, "version": 3}


def bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous tensor on the CPU; the array is its memory."""
    return np.asarray(_Interface(tensor, (tensor.numel() * tensor.element_size(),), "|u1"))


def elements_of(tensor: Tensor) -> npt.NDArray[Any]:
    """The elements of a strided tensor on the CPU, whatever its dtype, each as so many bytes; the array is its memory."""
    size = tensor.element_size()
    if not tensor.numel():
        return np.empty(tuple(tensor.shape), f"V{size}")
    strides = tuple(s * size for s in tensor.stride())
    return np.asarray(_Interface(tensor, tuple(tensor.shape), f"|V{size}", strides))


def has_memory(tensor: Tensor) -> bool:
    """Has a strided tensor memory of its own for its elements?

    Those that `torch.func` wraps and tensors of zeros that autograd makes up have none, FSDP's none while it is freed.
    """
    if not tensor.numel():
        return True
    if tensor._is_zerotensor() or _wrapped(tensor):
        return False
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (int(tensor.storage_offset()) + span) * tensor.element_size()
