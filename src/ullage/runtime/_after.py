"""What a replay leaves as it found it, although it stops half-way: a forward puts things back near its end."""

from __future__ import annotations

from operator import is_
from typing import Any

from ullage.runtime._reach import Reached


class Attributes:
    """The attributes of all modules that a call reaches, before a replay.

    Args:
        reached: what the call reaches.
    """

    __slots__ = ("_noted",)

    def __init__(self, reached: Reached) -> None:
        modules = [m for below in reached.below for r in below.modules if (m := r()) is not None]
        self._noted = [(d, list(d), list(d.values())) for d in [m.__dict__ for m in modules]]

    def put_back(self) -> None:
        """What is another object now goes back."""
        for d, keys, values in self._noted:
            if list(d) != keys or not all(map(is_, d.values(), values)):
                _put(d, dict(zip(keys, values, strict=True)))


def _put(fields: dict[str, Any], was: dict[str, Any]) -> None:
    for key in [k for k in fields if k not in was]:
        del fields[key]
    if list(fields) != list(was):  # the order is content, too
        fields.clear()
    fields.update(was)
