"""The line of the model's own code that runs now, or that an error comes from."""

from __future__ import annotations

import functools
import sys
import sysconfig
from pathlib import Path
from types import FrameType

import torch

OURS = str(Path(__file__).parent)
_FOREIGN = (str(Path(torch.__file__).parent), OURS)
_STANDARD = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["platstdlib"])
_A_MODEL = str(Path(OURS, "demo"))
A_STEP = str(Path(OURS, "workload", "_step.py"))


def source_line() -> str:
    """`folder/file.py:line` of the innermost frame that is neither torch's nor ours, or "".

    Where we run the step ourselves, frames around it are those of our caller, who has nothing to do with it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        short = _short_path(filename)
        if short:
            return f"{short}:{frame.f_lineno}"
        if filename == A_STEP:
            return ""
        frame = frame.f_back
    return ""


def line_of(error: BaseException) -> str:
    """As `source_line`, of the frames that an error has passed through since it was raised."""
    found, at = "", error.__traceback__
    while at is not None:
        short = _short_path(at.tb_frame.f_code.co_filename)
        found = f"{short}:{at.tb_lineno}" if short else found
        at = at.tb_next
    return found


def files_of(error: BaseException) -> list[str]:
    """The files whose code an error has passed through, the one that raised it last."""
    found, at = [], error.__traceback__
    while at is not None:
        found.append(at.tb_frame.f_code.co_filename)
        at = at.tb_next
    return found


@functools.cache
def _short_path(filename: str) -> str:
    """The last two parts of a file that is the model's own, or ""."""
    foreign = filename.startswith(_FOREIGN) and not filename.startswith(_A_MODEL)
    standard = filename.startswith(_STANDARD) and "-packages" not in filename
    return "" if foreign or standard or filename.startswith("<") else "/".join(filename.split("/")[-2:])
