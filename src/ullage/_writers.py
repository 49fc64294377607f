"""Who writes which kind of result to a file: results are data, and what draws or exports them stands above them.

A result's method hands itself over here, so that the module of the result needs no import of its writers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Writer = TypeVar("Writer", bound=Callable[..., Any])

_writers: dict[tuple[type, str], Callable[..., Any]] = {}


def writes(kind: type, verb: str) -> Callable[[Writer], Writer]:
    """Make a function `(result, path)` the writer of a kind of result, for one of its methods."""

    def registered(writer: Writer) -> Writer:
        _writers[kind, verb] = writer
        return writer

    return registered


def write(result: Any, verb: str, path: str | Path) -> None:
    """Have a result written by its writer."""
    _writers[type(result), verb](result, path)
