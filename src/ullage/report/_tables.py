"""The rows of a report's tables."""

from __future__ import annotations

from dataclasses import dataclass

from ullage.planner import Frontier
from ullage.report._overview import StepReport
from ullage.report._rows import signed


@dataclass(frozen=True)
class FrontierRow:
    """A point of the frontier, or a named policy; None where that can't be run."""

    what: str
    peak_bytes: int | None
    step_seconds: float | None
    slower: float | None
    note: str


@dataclass(frozen=True)
class MeasuredRow:
    """One number, predicted and measured: bytes, or seconds."""

    of: str
    what: str
    is_bytes: bool
    predicted: float
    measured: float

    @property
    def difference(self) -> str:
        """In words."""
        change = self.measured - self.predicted
        share = f"{change / self.predicted:+.1%}" if self.predicted else ""
        if not self.is_bytes:
            return share
        return "none" if not change else f"{signed(int(change))} ({share})"


def frontier_rows(f: Frontier) -> list[FrontierRow]:
    """The points, the smallest peak first, then the named policies."""
    fastest = f.points[-1].step_seconds
    slower = [p.step_seconds / fastest - 1 if fastest else 0.0 for p in f.points]
    rows = [
        FrontierRow("plan", p.peak_bytes, p.step_seconds, share, p.plan.kinds)
        for p, share in zip(f.points, slower, strict=True)
    ]
    for q in f.policies:
        share = q.step_seconds / fastest - 1 if q.step_seconds is not None and fastest else None
        rows.append(FrontierRow(q.policy, q.peak_bytes, q.step_seconds, share, q.reason))
    return rows


def measured_rows(o: StepReport) -> list[MeasuredRow]:
    """Peaks of the first and of later steps, and times, of each measurement beside what is predicted of its step."""
    rows = []
    for run in o.measured:
        m, t = run.measurement, o.planned if run.planned and o.planned is not None else o.plain
        of = f"{run.name}, {'planned' if run.planned else 'plain'} step"
        peaks = [
            ("peak", t.peak_bytes, m.peak_bytes),
            ("peak of the first step", t.first_step_peak_bytes, m.step_peaks[0]),
        ]
        if len(m.step_peaks) > 1:
            peaks.append(("peak of later steps", t.later_step_peak_bytes, max(m.step_peaks[1:])))
        rows += [MeasuredRow(of, what, True, predicted, measured) for what, predicted, measured in peaks]
        times = [("step time, median", m.step_seconds), ("step time, p90", m.p90), ("step time, p99", m.p99)]
        rows += [MeasuredRow(of, what, False, t.step_seconds, seconds) for what, seconds in times]
    return rows
