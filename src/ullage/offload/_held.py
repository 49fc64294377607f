"""What transfers are about: parts of tensors, and whatever holds a tensor's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

POISON = 0xA5  # as float32, float16 and bfloat16 a small negative number, as an index far out of range


@dataclass(frozen=True)
class Part:
    """`length` bytes at `start` of a tensor, at `offset` of the store."""

    offset: int
    start: int
    length: int


class Held(Protocol):
    """A tensor that a record holds."""

    tensor: Tensor

    def copy_out(self, start: int, staging: np.ndarray) -> None:
        """Fill a staging buffer with the bytes from `start` on; done when it returns.

        Raises:
            TransferError: the device reports an error.
        """

    def copy_in(self, staging: np.ndarray, start: int) -> None:
        """The other way."""

    def poison(self) -> None:
        """Overwrite it, before copies that are queued later."""

    def hand_over(self) -> None:
        """The current stream is about to use it."""
