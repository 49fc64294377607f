"""`Workload`: one training step's ingredients, and instances of it that can be run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from ullage._errors import WorkloadError
from ullage.workload._rebind import rebind

OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None


@dataclass
class Instance:
    """A workload that can be run: real, or a copy on fake tensors. Mutable: running a step trains it."""

    model: nn.Module
    batch: Any
    loss: Callable[[Any, Any], Tensor] | None
    optimizer: torch.optim.Optimizer | None
    autocast: torch.dtype | None
    accumulate: int
    step: Callable[[nn.Module, Any], None] | None

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter or buffer; the CPU for a model without any."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device("cpu")


@dataclass(frozen=True)
class Workload:
    """One training step.

    Args:
        model: the module to train, in the mode (`train()`) it trains in.
        batch: one micro-batch: a tensor, a tuple (positional) or a dict (keywords) for the model.
        loss: `(output, batch) -> scalar`. Without it a scalar output or an HF-style `.loss` is used.
            The output is released before backward starts; use `step` for a loop that keeps it.
        optimizer: an instance, a callable from parameters to one, or None (forward and backward only).
        autocast: a dtype, or None.
        accumulate: micro-batches per step; each loss is divided by it.
        step: instead of `loss`: `(model, batch) -> None`, one whole step its own way.

    Raises:
        WorkloadError: an argument is of the wrong kind.
    """

    model: nn.Module
    batch: Any
    loss: Callable[[Any, Any], Tensor] | None = None
    optimizer: OptimizerLike = None
    autocast: torch.dtype | None = None
    accumulate: int = 1
    step: Callable[[nn.Module, Any], None] | None = None
    factory: Callable[[], Workload] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.factory is not None:
            return
        if not isinstance(self.model, nn.Module):
            raise WorkloadError(f"model: expected a torch.nn.Module, got {type(self.model).__name__}")
        if not isinstance(self.batch, Tensor | tuple | dict):
            raise WorkloadError(f"batch: expected a tensor, a tuple or a dict, got {type(self.batch).__name__}")
        if isinstance(self.accumulate, bool) or not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise WorkloadError(f"accumulate: expected a whole number of 1 or more, got {self.accumulate!r}")
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise WorkloadError(f"autocast: expected a torch.dtype or None, got {self.autocast!r}")
        if self.step is not None and (self.loss is not None or self.optimizer is not None or self.accumulate != 1):
            raise WorkloadError("step: does the whole step itself; leave loss, optimizer and accumulate out")
        for name in ("loss", "step"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise WorkloadError(f"{name}: expected a callable, got {getattr(self, name)!r}")
        opt = self.optimizer
        if opt is not None and not isinstance(opt, torch.optim.Optimizer) and not callable(opt):
            raise WorkloadError(f"optimizer: expected an instance, a callable or None, got {type(opt).__name__}")

    @classmethod
    def from_factory(cls, factory: Callable[[], Workload]) -> Workload:
        """A workload built by calling `factory` (no arguments) whenever an instance is needed.

        Profiling and planning call it under fake tensors, so the model may be far larger than this machine.
        """
        if not callable(factory):
            raise WorkloadError(f"factory: expected a callable without arguments, got {type(factory).__name__}")
        return cls(nn.Module(), (), factory=factory)

    def build(self) -> Workload:
        """Return a workload without a factory; calls the factory if there is one.

        Raises:
            WorkloadError: the factory raised, or did not return a Workload.
        """
        if self.factory is None:
            return self
        try:
            built = self.factory()
        except Exception as error:
            name = getattr(self.factory, "__name__", repr(self.factory))
            raise WorkloadError(f"factory {name} raised {type(error).__name__}: {error}") from error
        if not isinstance(built, Workload):
            raise WorkloadError(f"factory: expected it to return a Workload, got {type(built).__name__}")
        return built.build()

    def instance_device(self) -> torch.device:
        """The device of the model's first parameter or buffer."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device("cpu")

    def instance(self) -> Instance:
        """The real thing: the user's own objects (or a fresh build of the factory)."""
        work = self.build()
        optimizer = work.optimizer
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(p for p in work.model.parameters() if p.requires_grad)
        return Instance(work.model, work.batch, work.loss, optimizer, work.autocast, work.accumulate, work.step)

    def fake_instance(self, mode: FakeTensorMode, active: Callable[[], AbstractContextManager[None]]) -> Instance:
        """A copy on fake tensors: the user's objects are not touched. `active` enters the mode and what goes with it.

        Raises:
            WorkloadError: the model, optimizer or step can't be copied.
        """
        if self.factory is not None:
            with active():
                return self.build().instance()
        memo: dict[int, Any] = {}
        try:
            with FakeCopyMode(mode):
                model = copy.deepcopy(self.model, memo)
                loss, step = rebind(self.loss, memo), rebind(self.step, memo)
                is_instance = isinstance(self.optimizer, torch.optim.Optimizer)
                optimizer: Any = copy.deepcopy(self.optimizer, memo) if is_instance else self.optimizer
                batch = copy.deepcopy(self.batch, memo)
        except Exception as error:
            raise WorkloadError(
                f"the model can't be copied onto fake tensors ({type(error).__name__}: {error}); "
                "build it in a function and use Workload.from_factory(fn)"
            ) from error
        if optimizer is not None and not is_instance:
            with active():
                optimizer = optimizer(p for p in model.parameters() if p.requires_grad)
        return Instance(model, batch, loss, optimizer, self.autocast, self.accumulate, step)
