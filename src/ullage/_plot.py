"""Plots in the terminal, with plotext from the extra `plot`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

HOW_TO_GET_IT = "pip install 'ullage[plot]'"
SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size_unit(nbytes: int) -> tuple[str, int]:
    """The unit that suits a size, and its bytes."""
    return next(((name, size) for name, size in SIZES if nbytes >= size), ("B", 1))


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that suits a time, and its seconds."""
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e-3)


def can_plot() -> bool:
    """Is plotext installed?"""
    return importlib.util.find_spec("plotext") is not None


def letter(symbol: str, color: int | None) -> Any:
    """A signal's letter, in a colour of 256 or in the terminal's own."""
    import plotext

    return symbol if color is None else plotext.marker(symbol, plotext.pixel(foreground=color))


def plotted(draw: Callable[[Any], None], width: int, height: int, color: bool) -> list[str] | None:
    """The lines of what `draw` draws on a plotext figure; None if plotext is not installed."""
    if not can_plot():
        return None
    import plotext

    figure = plotext.figure  # there is one for the whole process
    figure.clear()
    figure.plot_size(width, height)
    figure.theme("simple" if color else "colorless")  # the default one has a canvas of its own: pale, with pale letters
    draw(figure)
    text = str(figure.build())
    figure.clear()
    if not color:
        text = str(plotext.uncolorize(text))
    return [line.rstrip() for line in text.splitlines()]
