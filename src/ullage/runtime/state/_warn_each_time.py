"""Warnings that are seen each time: what is known to be wrong is wrong at every call, not at the first only."""

from __future__ import annotations

import sys
import warnings

from ullage._errors import UllageWarning
from ullage.runtime.state._walk import is_library


def again(text: str) -> None:
    """Warn, at the line of the user's that led here.

    Python shows a warning once per line and text, which it remembers in a registry of the module. This one gets a registry of its own;
    filters that a user has set ("ignore", "error", "once") are in force as ever.
    """
    frame = sys._getframe(1)
    while is_library(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    warnings.warn_explicit(text, UllageWarning, frame.f_code.co_filename, frame.f_lineno, registry={})
