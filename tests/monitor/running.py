"""Clocks and devices that do what a test says, and steps of known length under them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import ullage as ul
from ullage.monitor._device import HostProbe, Interval


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowProbe(HostProbe):
    """A device that is through with a step only when `reached` says so, as CUDA is."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.reached = self.begun = 0
        self.waited: list[int] = []
        self.number: dict[int, int] = {}

    def begin(self) -> Interval:
        step = super().begin()
        self.number[id(step)] = self.begun
        self.begun += 1
        return step

    def ready(self, step: Interval) -> bool:
        return self.number[id(step)] < self.reached

    def wait(self, step: Interval) -> None:
        self.waited.append(self.number[id(step)])

    def hold(self, loss: Tensor) -> Callable[[], float]:
        return lambda: loss.item()


def monitor(clock: Clock, model: nn.Module | None = None, **given: Any) -> ul.Monitor:
    """A monitor of a small model on a clock, with no warm-up and nothing counted unless asked to."""
    return ul.Monitor(model or nn.Linear(2, 2), clock=clock, **{"warmup": 0, "count_ops": False, **given})


def steps(m: ul.Monitor, clock: Clock, times: Iterable[float], between: float = 0.0, **given: Any) -> None:
    """Steps that take these seconds."""
    for seconds in times:
        with m.step(**given):
            clock.now += seconds
        clock.now += between


def dispatch_modes() -> int:
    return int(torch._C._len_torch_dispatch_stack())
