"""`StepReport`: the data of a report on one step: its timelines, plan, frontier and measurements."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ullage._bytes import format_bytes, format_seconds
from ullage._writers import write
from ullage.measure._measure import Measurement
from ullage.planner import Frontier, Plan
from ullage.report._records import where
from ullage.report._timeline import Timeline

_HOLDERS = 4


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A measurement, where it is from, and whether it is of the planned step."""

    name: str
    planned: bool
    measurement: Measurement


class StepReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A step at a glance. `str(overview)` is a few lines, `overview.export("report.html")` a page.

    Attributes:
        title: a name for the workload.
        plan: the plan with the bytes and seconds of this study; for the plain step, the plan of the policy "none".
        plain: the plain step.
        planned: the step under the plan; None if there is none.
        frontier: None if it was not asked for.
        measured: real steps, to compare with the prediction.
        notes: sentences about assumptions, and about measurements that can't be compared.
    """

    title: str
    plan: Plan
    plain: Timeline
    planned: Timeline | None
    frontier: Frontier | None
    measured: list[Measured]
    notes: list[str]

    @property
    def judged(self) -> Timeline:
        """The planned step, or the plain one if there is no plan."""
        return self.planned or self.plain

    @property
    def slowdown(self) -> float:
        """The step's predicted time over that of the plain step, less one."""
        plain = self.plain.step_seconds
        return self.judged.step_seconds / plain - 1 if plain else 0.0

    @property
    def answer(self) -> str:
        """The one sentence: what the step needs, and what it needs and costs with the plan."""
        plain = format_bytes(self.plain.peak_bytes)
        if self.planned is None:
            return f"This step needs {plain}."
        less = 1 - self.planned.peak_bytes / max(self.plain.peak_bytes, 1)
        if not less:
            return f"This step needs {plain}; the plan keeps everything."
        slower = f"{abs(self.slowdown) * 100:.1f} % {'slower' if self.slowdown >= 0 else 'faster'}"
        return (
            f"This step needs {plain}; with this plan {format_bytes(self.planned.peak_bytes)}, {less * 100:.0f} % less, {slower}, "
            "gradients the same bit for bit."
        )

    @property
    def lede(self) -> list[str]:
        """The answer in sentences: what the step needs, whether that fits, what holds the peak, the budget, the time."""
        t, at, budget, setup = self.judged, self.judged.peak, self.plan.budget_bytes, self.plan.setup
        what = "planned" if self.planned is not None else "plain"
        source = f", {at.source}" if at.source else ""
        holders = sorted(at.by_category.items(), key=lambda row: -row[1])[:_HOLDERS]
        held = ", ".join(f"{c} {format_bytes(n)} ({n / max(t.peak_bytes, 1):.0%})" for c, n in holders)
        said = [self.answer]
        if setup is not None and setup.memory_bytes is not None:
            said.append(f"Fits: {setup.fits(t.peak_bytes)} ({format_bytes(setup.memory_bytes)}).")
        said += [
            f"The {what} step peaks at {t.peak_bytes:,} bytes, in {where(at)}{source}.",
            f"At that moment it holds {held}.",
        ]
        if budget is not None:
            left = budget - t.peak_bytes
            room = (
                f"{format_bytes(left)} of it are free" if left >= 0 else f"the peak is {format_bytes(-left)} above it"
            )
            said.append(f"The budget is {format_bytes(budget)}: {room}.")
        time = f"A step takes about {format_seconds(t.step_seconds)}"
        against = f" ({format_seconds(self.plain.step_seconds)} plain)" if self.planned is not None else ""
        said.append(f"{time}{against}.")
        return said

    def export(self, path: str | Path) -> None:
        """Write the report as one HTML file that needs nothing else.

        Raises:
            ArgumentError: the ending is not .html, the folder is not there, or plotly or Jinja is not installed.
        """
        write(self, "export", path)

    def __str__(self) -> str:
        label = ", an ESTIMATE: this device is not here" if self.plain.estimate else ""
        lines = [f"report on {self.title}, {self.plain.device}{label} (costs: {self.plain.costs})"]
        lines += [str(self.plan.setup)] if self.plan.setup is not None else []
        lines += [f"  {sentence}" for sentence in self.lede]
        for m in self.measured:
            t = self.planned if m.planned and self.planned is not None else self.plain
            lines.append(
                f"  measured ({m.name}): peak {format_bytes(m.measurement.peak_bytes)}, predicted {format_bytes(t.peak_bytes)}; "
                f"step {format_seconds(m.measurement.step_seconds)}, predicted {format_seconds(t.step_seconds)}"
            )
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])
