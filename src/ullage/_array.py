"""A tensor's memory as a numpy array.

Not by `Tensor.numpy`: that forbids the storage to be resized ever after, and FSDP resizes those of parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


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
