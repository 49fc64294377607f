"""Progress on stderr: a bar with stage and elapsed time, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Report(Protocol):
    """Say which stage runs now and, if that is known, how much of it is done."""

    def __call__(self, text: str, done: int = 0, total: int | None = None, /) -> None:
        """Start a stage, or move on in it."""


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def __call__(self, text: str, done: int = 0, total: int | None = None, /) -> None:
        self.progress.update(self.task, description=text, completed=done, total=total)


def _silent(text: str, done: int = 0, total: int | None = None, /) -> None:
    """Nobody reads it."""


@contextmanager
def progress(as_json: bool = False) -> Iterator[Report]:
    """Return the callback that is called with stages while something runs. With --json, and where stderr is piped, it says nothing."""
    if as_json or not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, bar.add_task("starting", total=None))
