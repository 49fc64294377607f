"""What each thread is doing: which units it re-runs, and whether our own bookkeeping runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Apart:
    """What is ours and hangs on a unit's module, but is no state of the unit's: no replay looks at it or puts it back."""


class Giving:
    """Arguments that the unit around a replayed one can't give back as they were; names by storage.

    Attributes:
        moved: what is given has changed since.
        copied: a copy is given, as the unit around writes to the argument afterwards; it must not be what is saved.
    """

    __slots__ = ("copied", "moved")

    def __init__(self) -> None:
        self.moved: dict[int, str] = {}
        self.copied: dict[int, str] = {}


class _Local(threading.local):
    def __init__(self) -> None:
        self.units: list[str] = []
        self.quiet = False
        self.holding = False  # a unit's arguments are being saved with the hooks of a unit around it
        self.skipping = False  # a selective replay runs
        self.giving: Giving | None = None  # a replay gets its arguments back from the hooks of a unit around it
        self.autocast: tuple[Any, ...] = ()  # while a sparse product is computed: dispatch keys of autocast that are on
        self.on_skip: Callable[[Any, Any, Any], None] | None = None


local = _Local()


def blame(error: Exception, unit: str) -> None:
    """Note on an error which unit's backward it came out of; of units in units, the innermost."""
    if unit_of(error) is None:
        with contextlib.suppress(Exception):  # a class of the model's own may refuse attributes
            error.ullage_unit = unit  # type: ignore[attr-defined]


def unit_of(error: BaseException) -> str | None:
    """The name of the unit whose backward an error came out of, if it came out of one."""
    return getattr(error, "ullage_unit", None)


def is_recomputing() -> bool:
    """True while ullage re-runs a unit's forward during backward."""
    return bool(local.units)


def recomputing_units() -> list[str]:
    """Names of the units this thread is re-running, outermost first."""
    return local.units


def is_bookkeeping() -> bool:
    """Is what runs now ours, not the unit's or autograd's? See `quiet`."""
    return local.quiet


@contextlib.contextmanager
def telling_of_skips(on_skip: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """In this thread, call it with each op that a selective replay skips, its arguments and what stands for its output.

    No mode below sees such an op, and yet autograd makes a node for it.
    """
    before, local.on_skip = local.on_skip, on_skip
    try:
        yield
    finally:
        local.on_skip = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ops inside are ours, not the unit's: the modes that log or skip a unit's ops let them pass."""
    before, local.quiet = local.quiet, True
    try:
        yield
    finally:
        local.quiet = before
