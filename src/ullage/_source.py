"""The line of the model's own code that runs now."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FrameType

import torch

_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def source_line() -> str:
    """`folder/file.py:line` of the innermost frame that is neither torch's nor ours, or ""."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        short = _short_path(frame.f_code.co_filename)
        if short:
            return f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@functools.cache
def _short_path(filename: str) -> str:
    """The last two parts of a file that is the model's own, or ""."""
    foreign = filename.startswith(_FOREIGN) or filename.startswith("<")
    return "" if foreign else "/".join(filename.split("/")[-2:])
