"""Warnings that show each time, because a result known to be wrong is wrong at every call, not only at the first."""

from __future__ import annotations

import sys
import warnings

from ullage._errors import UllageWarning
from ullage.runtime.state._walk import is_library


def again(text: str) -> None:
    """Warn at the user's own line that led here.

    Python shows a warning once per line and text, and remembers that in a registry of the module. This warning gets a new registry
    each time; the user's filters ("ignore", "error", "once") still apply.
    """
    frame = sys._getframe(1)
    while is_library(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    warnings.warn_explicit(text, UllageWarning, frame.f_code.co_filename, frame.f_lineno, registry={})
