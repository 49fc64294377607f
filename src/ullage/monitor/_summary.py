"""A run so far: totals over all its steps, and statistics over the latest of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ullage._bytes import format_bytes, format_seconds
from ullage._stats import at_share, median
from ullage.monitor._jsonl import read_run
from ullage.monitor._records import Header, StepRecord


class MonitorSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in numbers; `str(summary)` is a table. None: not given, or not measured here (`not_available` says why).

    Attributes:
        device, device_name: where the model is.
        steps: steps that went well, warm-up included.
        warmup_steps: steps of the warm-up.
        failed_steps: steps that raised.
        window_steps: steps that the statistics are over: the latest ones that went well, without warm-up.
        step_seconds, p90, p99: median and percentiles of the step time; a percentile is the value at that share of the sorted times.
        jitter_seconds: mean absolute difference between one step's time and the next's.
        wait_seconds: median of the host's time between steps.
        samples_per_second, tokens_per_second: over the time in steps.
        mfu, hfu: mean over the steps that have one.
        flops_per_step: FLOPs of the model in a step: of the counted step, or as given.
        recomputed_flops: FLOPs that replays add to it.
        peak_allocated_bytes, peak_reserved_bytes: largest of all steps but the counted one.
        max_rss_bytes: the most resident memory the process ever had; not a peak of the allocator.
        recomputed_units, recomputed_ops, recomputed_bytes, skipped_ops: per step, medians of the window.
        offloaded_bytes: per step, the median.
        late_prefetches, stale_logs, replay_mismatches, nonfinite_losses, alloc_retries, ooms: of all steps.
        gpu_joules_per_step, gpu_joules_per_sample, cpu_joules_per_step, cpu_joules_per_sample: of all that was metered.
        predicted_peak_bytes, budget_bytes: of the plan in force.
        not_available: what is not measured here, and why.
    """

    device: str
    device_name: str
    steps: int
    warmup_steps: int
    failed_steps: int
    window_steps: int
    step_seconds: float | None
    p90: float | None
    p99: float | None
    jitter_seconds: float | None
    wait_seconds: float | None
    samples_per_second: float | None
    tokens_per_second: float | None
    mfu: float | None
    hfu: float | None
    flops_per_step: float | None
    recomputed_flops: float | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    max_rss_bytes: int | None
    recomputed_units: float | None
    recomputed_ops: float | None
    recomputed_bytes: float | None
    skipped_ops: float | None
    offloaded_bytes: float | None
    late_prefetches: int
    stale_logs: int
    replay_mismatches: int
    nonfinite_losses: int
    alloc_retries: int | None
    ooms: int | None
    gpu_joules_per_step: float | None
    gpu_joules_per_sample: float | None
    cpu_joules_per_step: float | None
    cpu_joules_per_sample: float | None
    predicted_peak_bytes: int | None
    budget_bytes: int | None
    not_available: dict[str, str]

    @staticmethod
    def load(path: str | Path) -> MonitorSummary:
        """The summary of a Monitor's file: of all its steps.

        Raises:
            MonitorError: it can't be read, or is none.
        """
        header, steps = read_run(path)
        tally = Tally(None)
        for step in steps:
            tally.add(step)
        return tally.summary(header)

    def __str__(self) -> str:
        at = self.device if self.device_name in ("", self.device) else f"{self.device} ({self.device_name})"
        lines = [f"monitor: {self.steps} steps on {at}, {self.warmup_steps} of warm-up, {self.failed_steps} failed"]
        lines += [f"  {name:<24} {value}" for name, value in _table(self)]
        return "\n".join(
            [*lines, *(f"  {what}: not available here, because {why}" for what, why in self.not_available.items())]
        )


def _table(s: MonitorSummary) -> Iterator[tuple[str, str]]:
    if s.step_seconds is not None and s.p90 is not None and s.p99 is not None:
        yield (
            "step time",
            f"{format_seconds(s.step_seconds)} (p90 {format_seconds(s.p90)}, p99 {format_seconds(s.p99)})",
        )
    for name, seconds in (("jitter", s.jitter_seconds), ("between steps", s.wait_seconds)):
        if seconds is not None:
            yield name, format_seconds(seconds)
    for name, rate in (("samples/s", s.samples_per_second), ("tokens/s", s.tokens_per_second)):
        if rate is not None:
            yield name, f"{rate:,.1f}"
    if s.mfu is not None:
        yield "MFU", f"{s.mfu:.1%}" + (f" (with recomputation {s.hfu:.1%})" if s.hfu is not None else "")
    if s.flops_per_step is not None:
        more = f", and {s.recomputed_flops / 1e9:,.3f} G recomputed" if s.recomputed_flops is not None else ""
        yield "FLOPs per step", f"{s.flops_per_step / 1e9:,.3f} G{more}"
    if s.peak_allocated_bytes is not None:
        yield "peak allocated", f"{format_bytes(s.peak_allocated_bytes)}{_beside(s)}"
    elif s.predicted_peak_bytes is not None:
        yield "predicted peak", format_bytes(s.predicted_peak_bytes)
    for name, size in (("peak reserved", s.peak_reserved_bytes), ("process, most resident", s.max_rss_bytes)):
        if size is not None:
            yield name, format_bytes(size)
    if s.recomputed_units is not None:
        made = f": {s.recomputed_ops:g} ops" if s.recomputed_ops is not None else ""
        made += f", {format_bytes(s.recomputed_bytes)}" if s.recomputed_bytes is not None else ""
        yield "recomputed per step", f"{s.recomputed_units:g} units{made}; {s.skipped_ops or 0:g} ops skipped"
    if s.offloaded_bytes:
        yield "offloaded per step", f"{format_bytes(s.offloaded_bytes)}; {s.late_prefetches} late prefetches in all"
    for name, count in (
        ("allocator retries", s.alloc_retries), ("out of memory", s.ooms), ("stale logs", s.stale_logs),
        ("replay mismatches", s.replay_mismatches), ("losses not finite", s.nonfinite_losses),
    ):  # fmt: skip
        if count is not None:
            yield name, str(count)
    for name, step, sample in (
        ("GPU energy", s.gpu_joules_per_step, s.gpu_joules_per_sample),
        ("processor energy", s.cpu_joules_per_step, s.cpu_joules_per_sample),
    ):
        if step is not None:
            yield name, f"{step:.3g} J per step" + (f", {sample:.3g} J per sample" if sample is not None else "")


def _beside(s: MonitorSummary) -> str:
    known = (("predicted", s.predicted_peak_bytes), ("budget", s.budget_bytes))
    found = ", ".join(f"{name} {format_bytes(size)}" for name, size in known if size is not None)
    return f" ({found})" if found else ""


class Tally:
    """Steps as they come: totals of all, and the latest `window` (None: all) of those that count for statistics."""

    def __init__(self, window: int | None) -> None:
        self.ring: deque[StepRecord] = deque(maxlen=window)
        self.steps = self.warmup = self.failed = 0
        self.flops: tuple[float | None, float | None] = (None, None)
        self.not_available: dict[str, str] = {}
        names = "late_prefetches", "stale_logs", "replay_mismatches", "nonfinite_loss", "alloc_retries", "ooms"
        self._sums = dict.fromkeys(names, 0)
        self._seen: set[str] = set()
        self._largest: dict[str, int] = {}
        self._joules: dict[str, list[float]] = {}  # joules, steps, samples

    def add(self, r: StepRecord) -> None:
        """Count a step."""
        for name in self._sums:
            value = getattr(r, name)
            if value:
                self._sums[name] += value
            if value is not None:
                self._seen.add(name)
        for name in ("max_allocated_bytes", "max_reserved_bytes", "max_rss_bytes"):
            value = getattr(r, name)
            if value is not None and not (r.counted and name != "max_rss_bytes"):
                self._largest[name] = max(value, self._largest.get(name, 0))
        if r.energy_steps:
            self._meter(r)
        self.not_available |= r.not_available
        if r.flops is not None:
            self.flops = (r.flops, r.recomputed_flops)
        if r.failed:
            self.failed += 1
            return
        self.steps += 1
        self.warmup += r.warmup
        if not r.warmup:
            self.ring.append(r)

    def _meter(self, r: StepRecord) -> None:
        for name in ("gpu_joules", "cpu_joules"):
            joules = getattr(r, name)
            if joules is not None:
                sums = self._joules.setdefault(name, [0.0, 0, 0])
                for k, value in enumerate((joules, r.energy_steps, r.energy_samples or 0)):
                    sums[k] += value

    def summary(self, header: Header) -> MonitorSummary:
        """Everything in numbers."""
        rows = list(self.ring)
        times = sorted(t for r in rows if (t := r.step_time_s) is not None)
        in_order = [r.step_time_s for r in rows if r.step_time_s is not None]
        changes = [abs(b - a) for a, b in zip(in_order[:-1], in_order[1:], strict=True)]
        gpu, cpu = (self._per(name) for name in ("gpu_joules", "cpu_joules"))
        return MonitorSummary(
            device=header.device,
            device_name=header.device_name,
            steps=self.steps,
            warmup_steps=self.warmup,
            failed_steps=self.failed,
            window_steps=len(rows),
            step_seconds=median(times) if times else None,
            p90=at_share(times, 0.9) if times else None,
            p99=at_share(times, 0.99) if times else None,
            jitter_seconds=sum(changes) / len(changes) if changes else None,
            wait_seconds=_median_of(rows, "wait_s"),
            samples_per_second=_rate(rows, "samples"),
            tokens_per_second=_rate(rows, "tokens"),
            mfu=_mean_of(rows, "mfu"),
            hfu=_mean_of(rows, "hfu"),
            flops_per_step=self.flops[0] if self.flops[0] is not None else header.flops_per_step,
            recomputed_flops=self.flops[1],
            peak_allocated_bytes=self._largest.get("max_allocated_bytes"),
            peak_reserved_bytes=self._largest.get("max_reserved_bytes"),
            max_rss_bytes=self._largest.get("max_rss_bytes"),
            recomputed_units=_median_of(rows, "recomputed_units"),
            recomputed_ops=_median_of(rows, "recomputed_ops"),
            recomputed_bytes=_median_of(rows, "recomputed_bytes"),
            skipped_ops=_median_of(rows, "skipped_ops"),
            offloaded_bytes=_median_of(rows, "offloaded_bytes"),
            late_prefetches=self._sums["late_prefetches"],
            stale_logs=self._sums["stale_logs"],
            replay_mismatches=self._sums["replay_mismatches"],
            nonfinite_losses=self._sums["nonfinite_loss"],
            alloc_retries=self._sums["alloc_retries"] if "alloc_retries" in self._seen else None,
            ooms=self._sums["ooms"] if "ooms" in self._seen else None,
            gpu_joules_per_step=gpu[0],
            gpu_joules_per_sample=gpu[1],
            cpu_joules_per_step=cpu[0],
            cpu_joules_per_sample=cpu[1],
            predicted_peak_bytes=header.predicted_peak_bytes,
            budget_bytes=header.budget_bytes,
            not_available=header.not_available | self.not_available,
        )

    def _per(self, name: str) -> tuple[float | None, float | None]:
        joules, steps, samples = self._joules.get(name, [0.0, 0, 0])
        return (joules / steps if steps else None), (joules / samples if samples else None)


def _values(rows: Sequence[StepRecord], name: str) -> list[float]:
    return [v for r in rows if (v := getattr(r, name)) is not None]


def _median_of(rows: Sequence[StepRecord], name: str) -> float | None:
    values = sorted(_values(rows, name))
    return median(values) if values else None


def _mean_of(rows: Sequence[StepRecord], name: str) -> float | None:
    values = _values(rows, name)
    return sum(values) / len(values) if values else None


def _rate(rows: Sequence[StepRecord], name: str) -> float | None:
    """Per second, over the steps whose number is known."""
    known = [r for r in rows if getattr(r, name) is not None and r.step_time_s]
    seconds = sum(r.step_time_s or 0.0 for r in known)
    return sum(getattr(r, name) for r in known) / seconds if seconds else None
