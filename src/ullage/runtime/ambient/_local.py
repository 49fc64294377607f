"""The state of each thread: which units it replays, and whether ullage's own bookkeeping runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Apart:
    """An object of ullage's that is attached to a unit's module and is no state of the unit: no replay looks at it or puts it back."""


class Giving:
    """Arguments that an outer unit can't give an inner one with their old values; names by storage.

    Attributes:
        moved: arguments that changed since.
        copied: arguments given as copies, because the outer unit writes to them afterwards; a copy must not be handed to backward
            as a saved tensor.
    """

    __slots__ = ("copied", "moved")

    def __init__(self) -> None:
        self.moved: dict[int, str] = {}
        self.copied: dict[int, str] = {}


class _Local(threading.local):
    def __init__(self) -> None:
        self.units: list[str] = []
        self.quiet = False
        self.holding = False  # a unit's arguments are being saved through the hooks of an outer unit
        self.skipping = False  # a selective replay runs
        # set while a replay gets its arguments back through the hooks of an outer unit
        self.giving: Giving | None = None
        self.autocast: tuple[Any, ...] = ()  # autocast's dispatch keys that are on, while a sparse product is computed
        self.on_skip: Callable[[Any, Any, Any], None] | None = None


local = _Local()


def blame(error: Exception, unit: str) -> None:
    """Note on an error which unit's backward raised it; of nested units, the innermost."""
    if unit_of(error) is None:
        with contextlib.suppress(Exception):  # a class of the model's own may refuse attributes
            error.ullage_unit = unit  # type: ignore[attr-defined]


def unit_of(error: BaseException) -> str | None:
    """Return the name of the unit whose backward raised an error, or None."""
    return getattr(error, "ullage_unit", None)


def is_recomputing() -> bool:
    """True while ullage replays a unit's forward during backward."""
    return bool(local.units)


def recomputing_units() -> list[str]:
    """Return the names of the units that this thread is replaying, outermost first."""
    return local.units


def is_bookkeeping() -> bool:
    """Does an op of ullage's bookkeeping run now, rather than one of the unit's or autograd's? See `quiet`."""
    return local.quiet


@contextlib.contextmanager
def telling_of_skips(on_skip: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """In this thread, call `on_skip` with each op that a selective replay skips, its arguments and the stand-in for its output.

    A capture needs it: no dispatch mode sees a skipped op, and yet autograd makes a node for it.
    """
    before, local.on_skip = local.on_skip, on_skip
    try:
        yield
    finally:
        local.on_skip = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Mark ops inside as ullage's bookkeeping: the modes that log or skip a unit's ops let them pass."""
    before, local.quiet = local.quiet, True
    try:
        yield
    finally:
        local.quiet = before
