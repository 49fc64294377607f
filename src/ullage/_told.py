"""The last guard around public functions: they raise our errors, whatever a step raises."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from ullage._errors import UllageError, UnsupportedTorch
from ullage._source import A_STEP, OURS, files_of, line_of

P = ParamSpec("P")
R = TypeVar("R")
_NOTED = "_of_progress"


def tells_of(kind: type[UllageError], but: Callable[[BaseException], bool] = lambda _: False) -> Callable[..., Any]:
    """Decorate a function so that it raises nothing but our errors, with the cause, and what its `progress` raises.

    Args:
        kind: the class of an error that is not ours.
        but: errors that come out as they are.
    """

    def decorate(call: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(call)
        def told(*args: P.args, **kwargs: P.kwargs) -> R:
            progress: Any = kwargs.get("progress")
            if callable(progress):
                kwargs["progress"] = _noting(progress)
            try:
                return call(*args, **kwargs)
            except UllageError as error:
                if error.told_as is not None:
                    raise error.told_as(str(error)) from error
                raise
            except Exception as error:
                if but(error) or hasattr(error, _NOTED):
                    raise
                raise kind(what_failed(error)) from error

        return told

    return decorate


@contextlib.contextmanager
def planned_step(kind: type[UllageError], but: Callable[[BaseException], bool] = lambda _: False) -> Iterator[None]:
    """Turn an error that only the planned step raises into one of ours that says so."""
    try:
        yield
    except Exception as error:
        if but(error) or isinstance(error, UnsupportedTorch):  # no fault of the plan's
            raise
        where, said = line_of(error), str(error) if isinstance(error, UllageError) else said_by(error)
        raise kind(
            f"{where + ': ' if where else ''}the planned step raises, and the plain one does not: {said}"
        ) from error


def said_by(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def what_failed(error: BaseException) -> str:
    """Say of another's error whether the user's step or a defect of ours raised it, and where."""
    files = files_of(error)
    if A_STEP in files:
        where = line_of(error)
        return f"{where + ': ' if where else ''}the step itself raises {said_by(error)}; run it once without ullage and mend it"
    at = error.__traceback__
    last = ""
    while at is not None:
        file = Path(at.tb_frame.f_code.co_filename)
        if file.is_relative_to(OURS):
            last = f"{file.relative_to(OURS)}:{at.tb_lineno}"
        at = at.tb_next
    return f"a defect of ullage, not of the step: {said_by(error)} (at ullage/{last}); please report it"


def out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, on any device?"""
    said = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in str(error) for s in said)


def _noting(progress: Callable[[str], None]) -> Callable[[str], None]:
    """Wrap the user's callback: the errors it raises are the user's to catch."""

    def say(line: str) -> None:
        try:
            progress(line)
        except Exception as error:
            with contextlib.suppress(AttributeError):
                setattr(error, _NOTED, True)
            raise

    return say
