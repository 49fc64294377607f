"""Progress on stderr: a bar with stage and elapsed time on a terminal; elsewhere a line for a stage of over two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE_SECONDS = 2.0


class Report(Protocol):
    """Say which stage runs now and, if that is known, how much of it is done."""

    def __call__(self, text: str, done: int = 0, total: int | None = None, /) -> None:
        """Start a stage, or move on in it."""


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def __call__(self, text: str, done: int = 0, total: int | None = None, /) -> None:
        self.progress.update(self.task, description=text, completed=done, total=total)


class _Lines:
    """A timer waits beside each stage, because the stage itself does not come back before it is done."""

    def __init__(self) -> None:
        self.text, self.timer, self.start = "", threading.Timer(0, lambda: None), time.monotonic()

    def __call__(self, text: str, done: int = 0, total: int | None = None, /) -> None:
        if text == self.text:
            return
        self.stop()
        self.text = text
        self.timer = threading.Timer(PATIENCE_SECONDS, self._say, (text,))
        self.timer.daemon = True
        self.timer.start()

    def _say(self, text: str) -> None:
        click.echo(f"ullage: {text} ... ({time.monotonic() - self.start:.0f} s so far)", err=True)

    def stop(self) -> None:
        self.timer.cancel()


@contextmanager
def progress() -> Iterator[Report]:
    """Return the callback that is called with stages while something runs."""
    if not sys.stderr.isatty():
        lines = _Lines()
        try:
            yield lines
        finally:
            lines.stop()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, bar.add_task("starting", total=None))
