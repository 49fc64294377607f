"""One capture, measurement or verification of a process at a time, and no thread that waits for ever."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from ullage._errors import CaptureError
from ullage._source import A_STEP

_LOCK = threading.RLock()
_holders: list[int] = []  # the thread that has the lock, as often as it has it
_WAITING = tuple(str(Path(threading.__file__).parent / name) for name in ("threading.py", "queue.py", "concurrent"))
PATIENCE_S = 20.0  # a step that waits for another thread as long as this waits for one that waits here


@contextlib.contextmanager
def one_at_a_time(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Captures, measurements and verifications of one process wait for each other; `say` is told after a second.

    Raises:
        CaptureError: the step of the one that runs calls this, or waits for the thread that does.
    """
    if _holders[-1:] == [threading.get_ident()] and _runs_a_step(sys._getframe()):
        raise CaptureError(
            "a step that is planned, measured or verified calls ullage itself; move that call out of the step"
        )
    if not _LOCK.acquire(timeout=1.0):
        if say is not None:
            say("waiting for a plan or measurement in another thread")
        _wait()
    _holders.append(threading.get_ident())
    try:
        yield
    finally:
        _holders.pop()
        _LOCK.release()


def _wait() -> None:
    """Wait for the lock, unless its holder waits for this thread."""
    stuck: tuple[int, int] | None = None
    since = time.monotonic()
    while not _LOCK.acquire(timeout=0.25):
        at, joins_me = _where_it_waits()
        if at is None or at != stuck:
            stuck, since = at, time.monotonic()
        if joins_me or (stuck is not None and time.monotonic() - since > PATIENCE_S):
            raise CaptureError(
                "a plan or measurement that runs in another thread has a step that waits for this thread, which would wait for that one: "
                "a step can't plan, measure or verify in a thread that it waits for; move that call out of the step"
            )


def _where_it_waits() -> tuple[tuple[int, int] | None, bool]:
    """Find where the holder's step waits for a thread (None if it does not), and whether it waits for this one."""
    frame = sys._current_frames().get(_holders[-1]) if _holders else None
    if frame is None or not frame.f_code.co_filename.startswith(_WAITING) or not _runs_a_step(frame):
        return None, False
    at, me = (id(frame), frame.f_lasti), threading.current_thread()
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_filename.startswith(_WAITING):
        if caller.f_code is threading.Thread.join.__code__ and caller.f_locals.get("self") is me:
            return at, True
        caller = caller.f_back
    return at, False


def _runs_a_step(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == A_STEP:
            return True
        frame = frame.f_back
    return False
