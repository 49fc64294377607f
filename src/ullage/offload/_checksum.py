"""Checksums of written bytes: xxHash (XXH3, 64 bits) where the package `xxhash` is installed, else zlib's CRC-32.

They find bytes that a drive, a cable or memory changed; they don't protect against an attacker. XXH3 is several times as
fast, which matters because one core's CRC-32 is no faster than a good drive. Both release the GIL.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Protocol


class Checksum(Protocol):
    """A checksum in the making."""

    def update(self, data: Any, /) -> None:
        """Add bytes, given as anything with a buffer."""

    def intdigest(self) -> int:
        """The checksum of all bytes so far."""


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def intdigest(self) -> int:
        return self._value


def checksum_maker() -> Callable[[], Checksum]:
    """Return the fastest maker of checksums that is installed."""
    try:
        import xxhash
    except ImportError:  # it comes with the extra `offload`
        return _Crc32
    return xxhash.xxh3_64
