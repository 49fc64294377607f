"""Hand records to the run's file and the loggers. One that fails is left out, with a warning: training goes on."""

from __future__ import annotations

import warnings
from typing import Any

from ullage._errors import UllageWarning
from ullage.monitor._jsonl import JsonlWriter
from ullage.monitor._records import Header, StepRecord, header_facts, metrics


class Output:
    """A run's file and loggers.

    Args:
        writer: of the file, or None.
        loggers: see `Monitor`.
        every: steps that one call of a logger is about.
    """

    def __init__(self, writer: JsonlWriter | None, loggers: list[Any], every: int) -> None:
        self.writer, self._loggers, self._every = writer, loggers, every
        self._unlogged: list[StepRecord] = []

    def start(self, header: Header) -> None:
        """A run starts. ArgumentError: another one has made the file meanwhile."""
        if self.writer is not None:
            self.writer.start(header)
        self._call_all("start", header_facts(header))

    def take(self, record: StepRecord) -> None:
        """Another step."""
        if self.writer is not None:
            self.writer.write(record)
        if self._loggers:
            self._unlogged.append(record)
            if len(self._unlogged) >= self._every:
                self._log()

    def flush(self) -> None:
        """Hand the file's lines to the system."""
        if self.writer is None:
            return
        try:
            self.writer.flush()
        except OSError as error:
            writer, self.writer = self.writer, None
            _warn(f"{writer.path}: can't be written any more ({error}); the monitor goes on without it")

    def close(self) -> None:
        """The run is over."""
        self.flush()
        self._log()
        self._call_all("close")
        if self.writer is not None:
            self.writer.close()

    def _log(self) -> None:
        if not self._unlogged:
            return
        found, step = metrics(self._unlogged), self._unlogged[-1].step
        self._unlogged = []
        if found:
            self._call_all("log", found, step)

    def _call_all(self, name: str, *given: Any) -> None:
        for logger in list(self._loggers):
            method = getattr(logger, name, None)
            if method is None:
                continue
            try:
                method(*given)
            except Exception as error:
                self._loggers = [other for other in self._loggers if other is not logger]
                _warn(
                    f"{type(logger).__name__}.{name} raised {type(error).__name__}: {error}; "
                    "the monitor goes on without it"
                )


def _warn(text: str) -> None:
    warnings.warn(text, UllageWarning, stacklevel=4)
