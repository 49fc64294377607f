"""The line of the model's own code that runs now."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FrameType

import torch

_OURS = str(Path(__file__).parent)
_FOREIGN = (str(Path(torch.__file__).parent), _OURS)
_A_MODEL = str(Path(_OURS, "demo"))
_A_STEP = str(Path(_OURS, "workload", "_step.py"))


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
        if filename == _A_STEP:
            return ""
        frame = frame.f_back
    return ""


@functools.cache
def _short_path(filename: str) -> str:
    """The last two parts of a file that is the model's own, or ""."""
    foreign = filename.startswith(_FOREIGN) and not filename.startswith(_A_MODEL)
    return "" if foreign or filename.startswith("<") else "/".join(filename.split("/")[-2:])
