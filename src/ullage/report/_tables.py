"""The rows of a report's tables."""

from __future__ import annotations

from dataclasses import dataclass

from ullage._bytes import format_bytes, format_seconds
from ullage.planner import Frontier
from ullage.report._overview import Overview
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
    """One number, predicted and measured."""

    of: str
    what: str
    predicted: str
    measured: str
    difference: str


def frontier_rows(f: Frontier) -> list[FrontierRow]:
    """The points, the smallest peak first, then the named policies."""
    fastest = f.points[-1].step_seconds
    slower = [p.step_seconds / fastest - 1 if fastest else 0.0 for p in f.points]
    rows = [
        FrontierRow(
            "plan", p.peak_bytes, p.step_seconds, share, ", ".join(f"{n} x {a}" for a, n in p.plan.counts().items())
        )
        for p, share in zip(f.points, slower, strict=True)
    ]
    for q in f.policies:
        share = q.step_seconds / fastest - 1 if q.step_seconds is not None and fastest else None
        rows.append(FrontierRow(q.policy, q.peak_bytes, q.step_seconds, share, q.reason))
    return rows


def measured_rows(o: Overview) -> list[MeasuredRow]:
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
        for what, predicted, measured in peaks:
            rows.append(
                MeasuredRow(of, what, _exact(predicted), _exact(measured), _off(measured - predicted, predicted))
            )
        for what, seconds in (
            ("step time, median", m.step_seconds),
            ("step time, p90", m.p90),
            ("step time, p99", m.p99),
        ):
            off = f"{seconds / t.step_seconds - 1:+.1%}" if t.step_seconds else ""
            rows.append(MeasuredRow(of, what, format_seconds(t.step_seconds), format_seconds(seconds), off))
    return rows


def _exact(nbytes: int) -> str:
    return f"{format_bytes(nbytes)} ({nbytes:,} bytes)"


def _off(change: int, of: int) -> str:
    return "none" if not change else f"{signed(change)} ({change / max(of, 1):+.2%})"
