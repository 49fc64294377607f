"""One step while it runs and until its device is through with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from ullage._errors import ArgumentError
from ullage.monitor._device import Interval, Probe
from ullage.monitor._energy import Spent
from ullage.monitor._flops import OpCounter
from ullage.monitor._records import StepRecord
from ullage.monitor._utilization import Counters, Utilization


@dataclass(slots=True)
class Running:
    """A step that has begun: its arguments, and the readings at its end."""

    step: int
    samples: int | None
    tokens: int | None
    flops: float | None
    warmup: bool
    wait_s: float | None
    counter: OpCounter | None = None
    interval: Interval | None = None
    before: tuple[int, ...] = ()
    counts: tuple[int, ...] = (0, 0, 0, 0, 0, 0)  # replays, skipped, stale, mismatches, sent, late
    losses: list[Callable[[], float]] = field(default_factory=list)
    time: float = 0.0
    rss: tuple[int | None, int | None] = (None, None)
    spent: Spent | None = None
    failed: str = ""

    @property
    def key(self) -> Any:
        """The facts that its FLOPs are taken to depend on."""
        return self.samples, self.tokens

    @property
    def counters(self) -> Counters:
        """Units and ops that its replays ran."""
        return self.counts[0], self.counts[1], self.counts[2]

    def ready(self, probe: Probe) -> bool:
        """Is everything there?"""
        return bool(self.failed) or self.interval is None or probe.ready(self.interval)

    def add_loss(self, loss: Any, probe: Probe) -> None:
        """Take a loss. ArgumentError: it is no number and no tensor of one element."""
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ArgumentError(
                    f"loss: expected one number, got a tensor of shape {tuple(loss.shape)}; reduce it first"
                )
            self.losses.append(probe.hold(loss))
        elif isinstance(loss, int | float):
            value = float(loss)
            self.losses.append(lambda: value)
        else:
            raise ArgumentError(f"loss: expected a number or a tensor of one element, got {type(loss).__name__}")

    def record(self, probe: Probe, use: Utilization, replays_known: bool) -> StepRecord:
        """Its record, once the step is ready."""
        if self.failed:
            return self._failed()
        assert self.interval is not None
        at, spent, counters = self.interval, self.spent, self.counters
        seconds = probe.seconds(at)
        losses = [value() for value in self.losses]
        mfu, hfu = (
            (None, None) if self.counter is not None else use.of(seconds, self.flops, self.step, self.key, counters)
        )
        ops, made = use.replays(self.step, counters) if replays_known else (None, None)
        counted = self.counter is not None and use.model_flops is not None
        loss = sum(losses) / len(losses) if losses else None
        return StepRecord(
            step=self.step,
            time=self.time,
            step_time_s=seconds,
            wait_s=self.wait_s,
            samples=self.samples,
            tokens=self.tokens,
            samples_per_sec=self.samples / seconds if self.samples is not None and seconds else None,
            tokens_per_sec=self.tokens / seconds if self.tokens is not None and seconds else None,
            mfu=mfu,
            hfu=hfu,
            flops=use.model_flops if counted else None,
            recomputed_flops=use.replay_flops if counted else None,
            max_allocated_bytes=at.max_allocated_bytes,
            max_reserved_bytes=at.max_reserved_bytes,
            rss_bytes=self.rss[0],
            max_rss_bytes=self.rss[1],
            alloc_retries=at.alloc_retries,
            ooms=at.ooms,
            recomputed_units=self.counts[0] if replays_known else None,
            skipped_ops=self.counts[1] if replays_known else None,
            stale_logs=self.counts[2] if replays_known else None,
            recomputed_ops=ops,
            recomputed_bytes=made,
            replay_mismatches=self.counts[3] if replays_known else None,
            offloaded_bytes=self.counts[4] if replays_known else None,
            late_prefetches=self.counts[5] if replays_known else None,
            loss=loss if loss is not None and math.isfinite(loss) else None,
            nonfinite_loss=not all(map(math.isfinite, losses)),
            gpu_joules=spent.gpu_joules if spent is not None else None,
            cpu_joules=spent.cpu_joules if spent is not None else None,
            energy_steps=spent.steps if spent is not None else None,
            energy_samples=spent.samples if spent is not None else None,
            warmup=self.warmup,
            counted=self.counter is not None,
            not_available=use.news(),
        )

    def _failed(self) -> StepRecord:
        at = self.interval
        return StepRecord(
            step=self.step,
            time=self.time,
            max_allocated_bytes=at.max_allocated_bytes if at is not None else None,
            max_reserved_bytes=at.max_reserved_bytes if at is not None else None,
            alloc_retries=at.alloc_retries if at is not None else None,
            ooms=at.ooms if at is not None else None,
            replay_mismatches=self.counts[3],
            stale_logs=self.counts[2],
            warmup=self.warmup,
            counted=self.counter is not None,
            failed=self.failed,
        )


class Watching(Protocol):
    """The monitor whose steps these are."""

    _open: Running | None

    def step_begin(self, *, samples: int | None = None, tokens: int | None = None, flops: float | None = None) -> None:
        """A step begins."""

    def step_end(self) -> None:
        """It is over."""

    def step_fail(self, error: BaseException | None = None) -> None:
        """It has raised."""

    def _note_loss(self, loss: Tensor | float) -> None:
        """A loss of it."""


class Step:
    """A step as a `with` block: `with monitor.step(samples=8) as step: ...; step.loss(loss)`."""

    __slots__ = ("_given", "_monitor")

    def __init__(self, monitor: Watching, given: dict[str, Any]) -> None:
        self._monitor, self._given = monitor, given

    def loss(self, loss: Tensor | float) -> None:
        """Note a loss: a number or a tensor of one element. Of several (micro-batches) the mean is recorded.

        It is looked at when the device has reached the end of the step: no GPU is waited for.
        """
        self._monitor._note_loss(loss)

    def __enter__(self) -> Step:
        self._monitor.step_begin(**self._given)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._monitor.step_end()
        elif self._monitor._open is not None:  # a loss that is none has dropped it already
            self._monitor.step_fail(error)


def number_of(name: str, value: Any) -> int | None:
    """A count as given. ArgumentError: no whole number of 0 or more. Tensors are refused: reading one would wait for a GPU."""
    if value is None or (type(value) is int and value >= 0):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0:
        return int(value)
    raise ArgumentError(f"{name}={value!r}: expected a whole number of 0 or more")


def flops_of(name: str, value: Any) -> float | None:
    """FLOPs as given. ArgumentError: no finite number above zero."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ArgumentError(f"{name}={value!r}: expected the FLOPs of a step, a number above zero")
    return float(value)
