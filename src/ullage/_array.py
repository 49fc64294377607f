"""A tensor's memory as a numpy array."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor


class _Flat:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # the array holds this object, and so the memory
        shape, data = (tensor.numel() * tensor.element_size(),), (tensor.data_ptr(), False)
        self.__array_interface__ = {"shape": shape, "typestr": "|u1", "data": data, "version": 3}


def bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous tensor on the CPU; the array is its memory.

    Not `Tensor.numpy`: that forbids the storage to be resized ever after, and FSDP resizes those of parameters.
    """
    return np.asarray(_Flat(tensor))
