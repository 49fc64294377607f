"""Addresses for storages that come and go: best fit, neighbours joined when they are free."""

from __future__ import annotations

from bisect import bisect_left, insort


class Arena:
    """One growing piece of memory.

    Attributes:
        begin: its first address.
        end: one past the last address ever used.
    """

    def __init__(self, begin: int) -> None:
        self.begin = self.end = begin
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._size_at: dict[int, int] = {}  # of free pieces, by their first address
        self._start_of: dict[int, int] = {}  # and their first address by one past the last

    def take(self, nbytes: int) -> int:
        """An address with `nbytes` free bytes, in use from now on."""
        k = bisect_left(self._free, (nbytes, -1))
        if k < len(self._free):
            size, address = self._free[k]
            self._remove(address)
        elif self.end in self._start_of:  # the last piece is free: grow it
            address = self._start_of[self.end]
            self._remove(address)
            size, self.end = nbytes, address + nbytes
        else:
            address, size = self.end, nbytes
            self.end += nbytes
        if size > nbytes:
            self._add(address + nbytes, size - nbytes)
        return address

    def give(self, address: int, nbytes: int) -> None:
        """These bytes are free again."""
        if address in self._start_of:
            before = self._start_of[address]
            nbytes += self._remove(before)
            address = before
        if address + nbytes in self._size_at:
            nbytes += self._remove(address + nbytes)
        self._add(address, nbytes)

    def _add(self, address: int, nbytes: int) -> None:
        insort(self._free, (nbytes, address))
        self._size_at[address], self._start_of[address + nbytes] = nbytes, address

    def _remove(self, address: int) -> int:
        nbytes = self._size_at.pop(address)
        del self._start_of[address + nbytes]
        del self._free[bisect_left(self._free, (nbytes, address))]
        return nbytes
