"""Facts of one step and of the machine it ran on: plain data, a line of JSON each."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from ullage._version import __version__

SCHEMA = 1


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Machine, versions and plan of a run: the first line of a Monitor's file.

    Attributes:
        monitor_schema: version of these records; a reader refuses what is newer than it knows.
        ullage, torch, python: versions.
        started: UTC, ISO 8601.
        host_cpu, cores: the machine.
        device, device_name: where the model is.
        warmup: steps at the start that count for no statistic.
        plan: digest of the plan in force, "" if there is none.
        predicted_peak_bytes, budget_bytes: of that plan.
        flops_per_step, peak_flops: as given, FLOPs and FLOP/s.
        energy: the meters that are read.
        not_available: what is not measured here, and why.
    """

    monitor_schema: int
    ullage: str
    torch: str
    python: str
    started: str
    host_cpu: str
    cores: int
    device: str
    device_name: str
    warmup: int
    plan: str = ""
    predicted_peak_bytes: int | None = None
    budget_bytes: int | None = None
    flops_per_step: float | None = None
    peak_flops: float | None = None
    energy: list[str] = []
    not_available: dict[str, str] = {}


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step. A field that is None was not given, or is not measured here (`Header.not_available` says why).

    Attributes:
        step: its number.
        time: when it ended, Unix seconds.
        step_time_s: from begin to end: of the CUDA stream, else of the host.
        wait_s: host seconds between the end of the step before and this one's begin (loading data, evaluation).
        samples, tokens: as given.
        samples_per_sec, tokens_per_sec: those over `step_time_s`.
        mfu: model FLOPs utilization, 0 to 1, recomputation not counted; `hfu`: counted.
        flops, recomputed_flops: of the model, and of replays; only in the step where ops were counted.
        max_allocated_bytes, max_reserved_bytes: largest of torch's CUDA allocator in the step.
        rss_bytes: resident memory of the process; `max_rss_bytes`: the most it ever had. Read when records are made, not for each.
        alloc_retries, ooms: of torch's CUDA allocator in this step.
        recomputed_units: units re-run; `skipped_ops`: ops that those replays left out; `stale_logs`: replays redone in full.
        recomputed_ops: ops that replays ran; `recomputed_bytes`: bytes of their outputs.
        replay_mismatches: replays that gave other values than their forward, as far as they are compared.
        offloaded_bytes: of saved tensors; `late_prefetches`: how many of these backward waited for though they were asked for ahead.
        loss: mean of the given losses; `nonfinite_loss`: one of them was NaN or infinite.
        gpu_joules, cpu_joules: spent since the last record that has this, over `energy_steps` steps and `energy_samples` samples.
        warmup: it counts for no statistic. `counted`: its ops were counted, so its peak is not the program's.
        failed: type of the exception that ended it, or "".
        not_available: fields that the counted step showed not to be measured here, and why.
    """

    step: int
    time: float
    step_time_s: float | None = None
    wait_s: float | None = None
    samples: int | None = None
    tokens: int | None = None
    samples_per_sec: float | None = None
    tokens_per_sec: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    flops: float | None = None
    recomputed_flops: float | None = None
    max_allocated_bytes: int | None = None
    max_reserved_bytes: int | None = None
    rss_bytes: int | None = None
    max_rss_bytes: int | None = None
    alloc_retries: int | None = None
    ooms: int | None = None
    recomputed_units: int | None = None
    skipped_ops: int | None = None
    stale_logs: int | None = None
    recomputed_ops: int | None = None
    recomputed_bytes: int | None = None
    replay_mismatches: int | None = None
    offloaded_bytes: int | None = None
    late_prefetches: int | None = None
    loss: float | None = None
    nonfinite_loss: bool = False
    gpu_joules: float | None = None
    cpu_joules: float | None = None
    energy_steps: int | None = None
    energy_samples: int | None = None
    warmup: bool = False
    counted: bool = False
    failed: str = ""
    not_available: dict[str, str] = {}


def machine_facts() -> dict[str, str | int]:
    """The header's facts about machine, versions and time."""
    return {
        "monitor_schema": SCHEMA,
        "ullage": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host_cpu": _processor(),
        "cores": os.cpu_count() or 0,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())


_GIB = 2**30
# A field, its tag and what one unit of the tag is. Tags are those of Composer and Lightning (`throughput/...`, `throughput/device/mfu`),
# torchtitan (`memory/num_alloc_retries`, `memory/num_ooms`) and Hugging Face (`train/loss`), where they have one; MLflow allows no brackets.
_LARGEST = {
    "max_allocated_bytes": ("memory/max_allocated_gib", _GIB),
    "max_reserved_bytes": ("memory/max_reserved_gib", _GIB),
    "rss_bytes": ("memory/process_rss_gib", _GIB),
    "max_rss_bytes": ("memory/process_max_rss_gib", _GIB),
}
_MEANS = {
    "step_time_s": ("perf/step_time_s", 1),
    "wait_s": ("perf/wait_s", 1),
    "mfu": ("throughput/device/mfu", 1),
    "hfu": ("throughput/device/hfu", 1),
    "recomputed_units": ("recompute/units", 1),
    "skipped_ops": ("recompute/skipped_ops", 1),
    "recomputed_ops": ("recompute/ops", 1),
    "recomputed_bytes": ("recompute/gib", _GIB),
    "offloaded_bytes": ("offload/gib", _GIB),
    "loss": ("train/loss", 1),
}
_SUMS = {
    "alloc_retries": ("memory/num_alloc_retries", 1),
    "ooms": ("memory/num_ooms", 1),
    "stale_logs": ("recompute/stale_logs", 1),
    "late_prefetches": ("offload/late_prefetches", 1),
    "replay_mismatches": ("stability/replay_mismatches", 1),
    "nonfinite_loss": ("stability/nonfinite_losses", 1),
}
_RATES = {"samples": "throughput/samples_per_sec", "tokens": "throughput/tokens_per_sec"}
_ENERGY = {"gpu_joules": "energy/gpu", "cpu_joules": "energy/cpu"}
TAGS = (
    *(tag for group in (_LARGEST, _MEANS, _SUMS) for tag, _ in group.values()),
    *_RATES.values(),
    *(f"{tag}_joules_per_{what}" for tag in _ENERGY.values() for what in ("step", "sample")),
    "stability/failed_steps",
)  # fmt: skip


def metrics(records: Sequence[StepRecord]) -> dict[str, float]:
    """Metrics of some steps in a row, by tag: largest bytes, mean times, sums of counts, throughput over all.

    Steps that failed are counted and no more.
    """
    good = [r for r in records if not r.failed]
    found: dict[str, float] = {}
    for names, join in ((_LARGEST, max), (_MEANS, _mean), (_SUMS, sum)):
        for name, (tag, unit) in names.items():
            values = [v for r in good if (v := getattr(r, name)) is not None]
            if values:
                found[tag] = join(values) / unit
    seconds = sum(r.step_time_s or 0.0 for r in good)
    for name, tag in _RATES.items():
        values = [getattr(r, name) for r in good]
        if seconds and values and None not in values:
            found[tag] = sum(values) / seconds
    found |= _energy(records)
    if len(good) < len(records):
        found["stability/failed_steps"] = len(records) - len(good)
    return {tag: float(value) for tag, value in found.items() if math.isfinite(value)}


def _energy(records: Iterable[StepRecord]) -> dict[str, float]:
    found = {}
    for name, tag in _ENERGY.items():
        read = [r for r in records if getattr(r, name) is not None]
        joules = sum(getattr(r, name) for r in read)
        for what in ("step", "sample"):
            count = sum(getattr(r, f"energy_{what}s") or 0 for r in read)
            if count:
                found[f"{tag}_joules_per_{what}"] = joules / count
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def header_facts(header: Header) -> Mapping[str, object]:
    """A header as plain data, for loggers that keep a run's configuration."""
    found: Mapping[str, object] = msgspec.to_builtins(header)
    return found
