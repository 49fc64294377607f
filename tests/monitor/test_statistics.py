"""Numbers of a run on a clock that is told the time: exact."""

from __future__ import annotations

import pytest

import ullage as ul
from tests.monitor.running import Clock, monitor, steps
from ullage._stats import at_share, median


def test_times_and_rates() -> None:
    clock = Clock()
    m = monitor(clock)
    times = [0.25, 0.5, 0.125, 1.0, 0.25]  # exact in binary, and so are their sums
    steps(m, clock, times, between=0.0625, samples=4, tokens=64)
    s = m.summary()
    assert (s.steps, s.warmup_steps, s.failed_steps, s.window_steps) == (5, 0, 0, 5)
    assert (s.step_seconds, s.p90, s.p99) == (0.25, 1.0, 1.0)
    assert s.jitter_seconds == (0.25 + 0.375 + 0.875 + 0.75) / 4
    assert s.wait_seconds == 0.0625
    assert s.samples_per_second == 20 / 2.125 and s.tokens_per_second == 320 / 2.125


def test_percentiles_of_a_hundred_and_of_an_even_number() -> None:
    clock = Clock()
    m = monitor(clock)
    clock.now = 0.0
    steps(m, clock, [k / 1024 for k in range(100, 0, -1)])
    s = m.summary()
    assert (s.step_seconds, s.p90, s.p99) == (50.5 / 1024, 91 / 1024, 100 / 1024)
    assert s.jitter_seconds == 1 / 1024
    assert median([1, 2, 4, 9]) == 3 and at_share([7], 0.99) == 7


def test_the_window_is_bounded_and_totals_are_not() -> None:
    clock = Clock()
    m = monitor(clock, window=3)
    steps(m, clock, [8.0, 8.0, 0.5, 0.25, 0.125], samples=1)
    s = m.summary()
    assert (s.steps, s.window_steps, s.step_seconds) == (5, 3, 0.25)
    assert s.samples_per_second == 3 / 0.875
    assert len(m._tally.ring) == 3 and not m._pending


def test_warmup_and_failed_steps_count_for_no_statistic() -> None:
    clock = Clock()
    m = monitor(clock, warmup=2)
    steps(m, clock, [64.0, 32.0, 0.5])
    with pytest.raises(RuntimeError, match="of the user"), m.step():
        clock.now += 128.0
        raise RuntimeError("of the user")
    steps(m, clock, [0.25])
    s = m.summary()
    assert (s.steps, s.warmup_steps, s.failed_steps, s.window_steps) == (4, 2, 1, 2)
    assert (s.step_seconds, s.p99) == (0.375, 0.5)


def test_a_run_without_steps() -> None:
    with monitor(Clock()) as m:
        pass
    s = m.summary()
    assert s.steps == 0 and s.step_seconds is s.p90 is s.jitter_seconds is s.samples_per_second is s.mfu is None
    assert str(m).startswith("monitor: 0 steps on cpu, 0 of warm-up, 0 failed\n")


def test_rates_are_of_the_steps_whose_number_is_known() -> None:
    clock = Clock()
    m = monitor(clock, samples_per_step=8)
    steps(m, clock, [1.0])
    steps(m, clock, [3.0], samples=4, tokens=6)
    s = m.summary()
    assert s.samples_per_second == 3.0 and s.tokens_per_second == 2.0


def test_utilization_of_given_flops() -> None:
    clock = Clock()
    m = monitor(clock, flops_per_step=4e9, peak_flops=16e9)
    steps(m, clock, [0.5])
    steps(m, clock, [0.5], flops=8e9)
    s = m.summary()
    assert s.mfu == (0.5 + 1.0) / 2 and s.hfu is None and s.flops_per_step == 4e9
    assert "MFU" not in s.not_available


def test_what_a_processor_can_do_is_not_guessed() -> None:
    clock = Clock()
    m = monitor(clock, flops_per_step=4e9)
    steps(m, clock, [0.5])
    assert m.summary().mfu is None
    assert m.summary().not_available["MFU"] == "the peak FLOP/s of this processor are not known; pass peak_flops="


def test_the_table() -> None:
    clock = Clock()
    m = monitor(clock, flops_per_step=4e9, peak_flops=16e9, samples_per_step=2)
    steps(m, clock, [0.5, 0.5])
    said = str(m)
    for line in (
        "  step time                500.00 ms (p90 500.00 ms, p99 500.00 ms)",
        "  samples/s                4.0",
        "  MFU                      50.0%",
        "  FLOPs per step           4.000 G",
        "  recomputed per step      0 units: 0 ops, 0 B; 0 ops skipped",
        "  losses not finite        0",
    ):
        assert line in said.splitlines(), line
    assert "peak allocated: not available here, because torch's CPU allocator keeps no record" in said


def test_the_process_memory_is_named_as_such() -> None:
    clock = Clock()
    m = monitor(clock)
    steps(m, clock, [1.0])
    record = m._tally.ring[0]
    assert record.max_allocated_bytes is None and record.max_reserved_bytes is None
    assert record.rss_bytes is not None and record.max_rss_bytes is not None
    assert 2**20 < record.rss_bytes <= record.max_rss_bytes < 2**40
    s = m.summary()
    assert s.peak_allocated_bytes is None and s.max_rss_bytes == record.max_rss_bytes
    assert isinstance(s, ul.MonitorSummary)
