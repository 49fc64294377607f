"""Drawings of a frontier: a picture file (matplotlib) and one in the terminal (plotext). Both are in the extra `plot`."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullage._errors import ArgumentError
from ullage._files import check_writable, write_whole
from ullage._plot import HOW_TO_GET_IT, plotted, size_unit, time_unit
from ullage._writers import writes
from ullage.planner.answers._frontier import Frontier

KINDS = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class _Drawn:
    """Peaks (x) and step times (y) of the points and of the policies, in units that suit them all."""

    xs: list[float]
    ys: list[float]
    policies: list[tuple[str, float, float]]
    x_label: str
    y_label: str
    title: str
    memory: float | None  # the device's, if it lies between the ends


def check_picture(path: str | Path) -> Path:
    """Return the path; ArgumentError if no picture can be drawn there. Nothing is created."""
    path = check_writable(path)
    if path.suffix.lower() not in KINDS:
        raise ArgumentError(f"{path}: a picture is one of {', '.join(KINDS)}; the file's ending says which")
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError(f"{path}: a picture needs matplotlib; {HOW_TO_GET_IT}")
    return path


@writes(Frontier, "plot")
def picture(f: Frontier, path: str | Path) -> None:
    """Draw the curve as steps and the policies as named crosses. The same frontier gives the same file."""
    path, d = check_picture(path), _drawn(f)
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.step(d.xs, d.ys, where="post", marker="o", label="plans")
    crosses = [x for _, x, _ in d.policies], [y for _, _, y in d.policies]
    axes.scatter(*crosses, marker="x", color="C1", label="named policies", zorder=3)
    for name, x, y in d.policies:
        axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize="small")
    if d.memory is not None:
        axes.axvline(d.memory, color="C3", linestyle="--", label=f"memory of {f.device}")
    axes.margins(x=0.1)
    axes.set(xlabel=d.x_label, ylabel=d.y_label, title=d.title)
    axes.grid(alpha=0.3)
    axes.legend()
    data, kind = io.BytesIO(), path.suffix.lower().removeprefix(".")
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with matplotlib.rc_context({"svg.hashsalt": "ullage", "svg.fonttype": "none"}):
        figure.savefig(data, format=kind, dpi=150, metadata=undated)
    write_whole(path, data.getvalue())


def terminal(f: Frontier, width: int = 80, height: int = 20, color: bool = False) -> str | None:
    """Draw the same as text, with letters for policies; None if plotext is not installed."""
    d = _drawn(f)
    letters = list(zip("abcdefghij", d.policies, strict=False))

    def draw(figure: Any) -> None:
        corners = [(x, y) for i, x in enumerate(d.xs) for y in (d.ys[max(i - 1, 0)], d.ys[i])]
        steps = figure.signal([x for x, _ in corners], [y for _, y in corners], marker="·")
        steps.lines()
        figure.draw(steps)
        figure.draw(figure.signal(d.xs, d.ys, marker="o"))
        for letter, (_, x, y) in letters:
            figure.draw(figure.signal([x], [y], marker=letter))
        figure.label(d.x_label, "x")
        figure.label(d.y_label, "y")
        figure.title(d.title)

    lines = plotted(draw, width, height, color)
    names = "  ".join(f"{letter} {name}" for letter, (name, _, _) in letters)
    return "\n".join([*lines, f"  o plans  {names}"]) if lines is not None else None


def _drawn(f: Frontier) -> _Drawn:
    ran = [(p.policy, p.peak_bytes, p.step_seconds) for p in f.policies]
    known = [(n, b, s) for n, b, s in ran if b is not None and s is not None]
    low, high = f.points[0].peak_bytes, f.points[-1].peak_bytes
    x_unit, x = size_unit(high)
    y_unit, y = time_unit(f.points[0].step_seconds)
    return _Drawn(
        xs=[p.peak_bytes / x for p in f.points],
        ys=[p.step_seconds / y for p in f.points],
        policies=[(n, b / x, s / y) for n, b, s in known],
        x_label=f"peak, {x_unit}",
        y_label=f"step time, {y_unit}",
        title=f"frontier for {f.device}{' (an estimate)' if f.estimate else ''}",
        memory=f.memory_bytes / x if f.memory_bytes is not None and low <= f.memory_bytes <= high else None,
    )
