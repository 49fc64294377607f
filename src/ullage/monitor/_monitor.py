"""`Monitor`: what steps take, watched from around any training loop."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ullage._errors import ArgumentError, MonitorError
from ullage.apply import Handle
from ullage.monitor._device import CudaProbe, Probe, ProcessMemory, probe_for
from ullage.monitor._energy import Energy
from ullage.monitor._flops import OpCounter
from ullage.monitor._jsonl import JsonlWriter
from ullage.monitor._loggers import Logger
from ullage.monitor._output import Output
from ullage.monitor._setup import checked, device_of, header, is_compiled, model_and_handle, why_not_counted
from ullage.monitor._step import Running, Step, flops_of, number_of
from ullage.monitor._summary import MonitorSummary, Tally
from ullage.monitor._utilization import Peak, Utilization
from ullage.runtime import totals

_BATCH = 64  # steps that are recorded in one go
_SECONDS = 1.0  # or after so long, however few


class Monitor:
    """Watches the steps of a training loop: memory, time, throughput, utilization, recomputation, energy.

        with ul.Monitor(handle, tokens_per_step=8192, jsonl="run.jsonl") as monitor:
            for batch in loader:
                with monitor.step() as step:
                    ...  # forward, backward, optimizer
                    step.loss(loss)
        print(monitor)

    `step_begin()` and `step_end()` do without the inner `with`. Nothing is put on the model, and no GPU is waited for while steps
    run: records of steps that the device has finished are made some steps later, at least once a second. A step that raises is dropped and
    counted as failed.

    Args:
        model: the model that is trained, or the `Handle` of its plan.
        samples_per_step: samples in a step, where `step(samples=)` does not say it.
        tokens_per_step: tokens in a step, likewise.
        flops_per_step: FLOPs of the model in a step, without recomputation; None: the ops of the last warm-up step are counted.
        peak_flops: FLOP/s that the device can do at best, or a name of `ullage devices`; None: by the name of the GPU.
        count_ops: count the ops of the last warm-up step, under a dispatch mode: it takes longer than others.
        warmup: steps at the start that no statistic is over.
        window: the latest steps that statistics are over.
        jsonl: file to write a line per step to.
        exists: what to do if that is there: "refuse", "overwrite" or "append".
        loggers: `TensorBoardLogger`, `WandbLogger`, `MLflowLogger`, or anything with `log(metrics, step)`.
        log_every: steps that one call of a logger is about.
        first_step: number of the first step, for a run that goes on.
        clock: the host's seconds, for tests; steps on CUDA are timed by events all the same.

    Raises:
        ArgumentError: an argument has a value that means nothing, or the file can't be written.
        DeviceError: `peak_flops` names no device.
    """

    def __init__(
        self,
        model: nn.Module | Handle,
        *,
        samples_per_step: int | None = None,
        tokens_per_step: int | None = None,
        flops_per_step: float | None = None,
        peak_flops: float | str | None = None,
        count_ops: bool = True,
        warmup: int = 2,
        window: int = 1000,
        jsonl: str | Path | None = None,
        exists: str = "refuse",
        loggers: Iterable[Logger] = (),
        log_every: int = 10,
        first_step: int = 0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._samples = number_of("samples_per_step", samples_per_step)
        self._tokens = number_of("tokens_per_step", tokens_per_step)
        given = flops_of("flops_per_step", flops_per_step)
        for name, value, least in (
            ("warmup", warmup, 0),
            ("window", window, 1),
            ("log_every", log_every, 1),
            ("first_step", first_step, 0),
        ):
            if type(value) is not int or value < least:
                raise ArgumentError(f"{name}={value!r}: expected a whole number of {least} or more")
        self._warmup, self._next = warmup, first_step
        to = checked(loggers)
        module, handle = model_and_handle(model)
        device, more = device_of(module)
        compiled = is_compiled(module)
        self._probe: Probe = probe_for(device, clock)
        peak = Peak(peak_flops, self._probe.name)
        self._use = Utilization(peak, given, why_not_counted(count_ops, warmup, compiled))
        self._replays_known = not compiled
        writer = JsonlWriter(jsonl, exists) if jsonl is not None else None
        self._clock = clock or time.perf_counter
        self._memory = ProcessMemory()
        self._energy = Energy(self._probe.index if isinstance(self._probe, CudaProbe) else None)
        not_available = self._probe.not_available | self._energy.not_available | more | self._use.news()
        if compiled:
            not_available["recomputation"] = (
                "the model is compiled: its units run torch's own checkpoint, which does not count"
            )
        self.header = header(
            handle, str(device), self._probe.name, warmup, given, peak.number, self._energy.names, not_available
        )
        self._tally = Tally(window)
        self._open: Running | None = None
        self._counting: OpCounter | None = None
        self._pending: deque[Running] = deque()
        self._begun = 0
        self._ended = self._settled = self._clock()
        self._closed = False
        self._output = Output(writer, to, log_every)
        self._output.start(self.header)
        if writer is not None:
            weakref.finalize(self, writer.close)  # a script that ends without closing the monitor has its lines

    # --- steps -----------------------------------------------------------------------------------------------------------

    def step(self, *, samples: int | None = None, tokens: int | None = None, flops: float | None = None) -> Step:
        """A step as a `with` block; arguments as for `step_begin`."""
        return Step(self, {"samples": samples, "tokens": tokens, "flops": flops})

    def step_begin(self, *, samples: int | None = None, tokens: int | None = None, flops: float | None = None) -> None:
        """A step begins.

        Args:
            samples: samples in this step; None: `samples_per_step`.
            tokens: tokens in this step; None: `tokens_per_step`.
            flops: FLOPs of the model in this step, where steps differ.

        Raises:
            MonitorError: a step is open, or the monitor is closed.
            ArgumentError: an argument has a value that means nothing.
        """
        if self._closed:
            raise MonitorError("this monitor is closed; make another one")
        if self._open is not None:
            raise MonitorError(
                f"step {self._open.step} is open: steps do not overlap; call step_end() first, or step_fail() if it raised"
            )
        samples = self._samples if samples is None else number_of("samples", samples)
        tokens = self._tokens if tokens is None else number_of("tokens", tokens)
        flops = flops_of("flops", flops)
        now = self._clock()
        warmup = self._begun < self._warmup
        counts = self._use.wanted and self._begun >= self._warmup - 1 and not OpCounter.active
        wait = now - self._ended if self._begun else None
        running = Running(self._next, samples, tokens, flops, warmup or counts, wait)
        self._energy.begin(now)
        if counts:
            running.counter = self._counting = OpCounter()
            self._counting.__enter__()
        self._begun += 1
        self._next += 1
        self._open = running
        running.before = totals.now()
        running.interval = self._probe.begin()

    def step_end(self, loss: Tensor | float | None = None) -> None:
        """The open step ends.

        Args:
            loss: its loss, a number or a tensor of one element, if it is to be recorded; no GPU is waited for.

        Raises:
            MonitorError: no step is open.
            ArgumentError: `loss` is neither; the step is dropped.
        """
        running = self._running("end")
        if loss is not None:
            self._note_loss(loss)
        assert running.interval is not None
        self._probe.end(running.interval)
        self._over(running)
        if running.counter is not None:
            self._use.take(running.counter, running.step, running.key, running.counters)
        if len(self._pending) >= _BATCH or not 0 <= self._ended - self._settled < _SECONDS:
            self._settle()

    def step_fail(self, error: BaseException | None = None) -> None:
        """The open step is dropped: it raised `error`. MonitorError: no step is open."""
        running = self._running("drop")
        running.failed = type(error).__name__ if error is not None else "failed"
        # a device's error comes up again with every call; the one that is on its way says more
        with contextlib.suppress(RuntimeError):
            if running.interval is not None:
                self._probe.drop(running.interval)
        self._over(running)
        with contextlib.suppress(RuntimeError):
            self._settle()

    def _running(self, what: str) -> Running:
        if self._open is None:
            raise MonitorError(f"no step is open to {what}; call step_begin() first")
        return self._open

    def _note_loss(self, loss: Any) -> None:
        running = self._running("note a loss of")
        try:
            running.add_loss(loss, self._probe)
        except ArgumentError as error:
            self.step_fail(error)
            raise

    def _over(self, running: Running) -> None:
        """The common end of every step."""
        self._open = None
        if self._counting is not None:
            counting, self._counting = self._counting, None
            counting.__exit__(None, None, None)
        before, now = running.before, totals.now()
        running.counts = tuple([b - a for a, b in zip(before, now, strict=True)])
        running.time, self._ended = time.time(), self._clock()
        if self._energy.names:
            running.spent = self._energy.end(running.samples, self._ended)
        if self._energy.failed:
            self._use.not_available["energy"], self._energy.failed = self._energy.failed, ""
        self._pending.append(running)

    # --- records ---------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Record the steps that their device is through with. Some at a time: alone, each would pay for cold caches."""
        self._settled = self._ended
        pending = self._pending
        if pending and not pending[-1].failed and not self._closed:
            pending[-1].rss = self._memory.read()
        while pending and pending[0].ready(self._probe):
            self._take(pending.popleft())
        self._output.flush()

    def _take(self, running: Running) -> None:
        record = running.record(self._probe, self._use, self._replays_known)
        self._tally.add(record)
        self._output.take(record)

    def summary(self) -> MonitorSummary:
        """The run so far: totals of all steps that the device is through with, statistics of the latest."""
        self._settle()
        return self._tally.summary(self.header)

    def __str__(self) -> str:
        return str(self.summary())

    # --- the end ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Record what is left, waiting for the device, and close file and loggers. A step that is open is dropped."""
        if self._closed:
            return
        if self._open is not None:
            self.step_fail()
        self._closed = True
        try:
            if self._pending:
                self._pending[-1].rss = self._memory.read()
            while self._pending:
                running = self._pending.popleft()
                if not running.failed and running.interval is not None:
                    try:
                        self._probe.wait(running.interval)
                    except RuntimeError as error:  # the device is lost; what was read on the host stays
                        running.failed = type(error).__name__
                self._take(running)
        finally:
            self._energy.close()
            self._memory.close()
            self._output.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
