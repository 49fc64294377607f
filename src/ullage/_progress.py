"""Progress on a terminal: after two seconds, one line on stderr names the stage; it is erased when the result is there."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Progress = Callable[[str], None] | bool | None

PATIENCE_SECONDS = 2.0


def shows_progress(call: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function with `progress=`: None or True shows a line on a terminal, False nothing; a callback gets the stages."""

    @functools.wraps(call)
    def shown(*args: P.args, **kwargs: P.kwargs) -> R:
        given = kwargs.get("progress")
        if callable(given):
            return call(*args, **kwargs)
        kwargs["progress"] = None
        if given is False or not sys.stderr.isatty():
            return call(*args, **kwargs)
        with _line() as say:
            kwargs["progress"] = say
            return call(*args, **kwargs)

    return shown


def callback(progress: Progress) -> Callable[[str], None] | None:
    """Return the argument of a decorated function as a callback or None."""
    return progress if callable(progress) else None


@contextmanager
def _line() -> Iterator[Callable[[str], None]]:
    """A callback whose last stage stands on stderr's last line once time is up."""
    line = _Line()
    timer = threading.Timer(PATIENCE_SECONDS, line.begin)
    timer.daemon = True
    timer.start()
    try:
        yield line.say
    finally:
        timer.cancel()
        line.clear()


class _Line:
    def __init__(self) -> None:
        self.text, self.start, self.shown, self.lock = "", time.monotonic(), False, threading.Lock()
        self.over = False

    def say(self, text: str, *_: Any) -> None:
        with self.lock:
            self.text = text
            if self.shown:
                self._write()

    def begin(self) -> None:
        with self.lock:
            if not self.over:
                self.shown = True
                self._write()

    def _write(self) -> None:
        sys.stderr.write(f"\r\x1b[Kullage: {self.text} ({time.monotonic() - self.start:.0f} s)"[:90])
        sys.stderr.flush()

    def clear(self) -> None:
        with self.lock:
            self.over = True
            if self.shown:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
