"""Columns of numbers, packed: 100,000 events are a file of a few MB."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

_WIDTHS = ("<i1", "<i2", "<i4", "<i8")


class Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Numbers of one kind. `values` is the array.

    Attributes:
        dtype: numpy's name of the words in `data`: "<i1" to "<i8" or "<f8".
        data: zlib. Integers are stored as the difference from the one before: live bytes and names mostly stay as they were.
    """

    dtype: str
    data: bytes

    @classmethod
    def of(cls, values: Sequence[Any] | npt.NDArray[Any]) -> Column:
        """Pack numbers."""
        array = np.asarray(values)
        if array.dtype.kind == "f":
            return cls("<f8", zlib.compress(array.astype("<f8").tobytes(), 9))
        steps = np.diff(array.astype(np.int64), prepend=np.int64(0))
        most = int(np.abs(steps).max(initial=0))
        dtype = next(d for d in _WIDTHS if most <= np.iinfo(d).max)
        return cls(dtype, zlib.compress(steps.astype(dtype).tobytes(), 9))

    @cached_property
    def values(self) -> npt.NDArray[Any]:
        """The numbers: float64 or int64.

        Raises:
            ValueError: the data is damaged.
        """
        if self.dtype not in (*_WIDTHS, "<f8"):
            raise ValueError(f"a column of {self.dtype!r}")
        try:
            words = np.frombuffer(zlib.decompress(self.data), self.dtype)
        except zlib.error as error:
            raise ValueError(f"a column can't be unpacked: {error}") from error
        found = words.astype(np.float64) if self.dtype == "<f8" else np.cumsum(words, dtype=np.int64)
        found.flags.writeable = False
        return found
