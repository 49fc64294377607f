"""`Workload`: one training step's ingredients, and instances of it that can be run."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ullage._errors import UllageError, WorkloadError
from ullage._torch import FakeCopyMode, FakeTensor, FakeTensorMode
from ullage.workload._batch import check_batch, tensors_of
from ullage.workload._copy import Copier
from ullage.workload._reads import Reads

OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None


def make_optimizer(given: OptimizerLike, model: nn.Module) -> torch.optim.Optimizer | None:
    """The optimizer, made by calling `given` if that is a callable.

    Raises:
        WorkloadError: the callable raised, or returned something else.
    """
    if given is None or isinstance(given, torch.optim.Optimizer):
        return given
    try:
        made = given([p for p in model.parameters() if p.requires_grad])
    except Exception as error:
        raise WorkloadError(f"optimizer: the callable raised {type(error).__name__}: {error}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise WorkloadError(f"optimizer: the callable returned {type(made).__name__}, not a torch.optim.Optimizer")
    return made


def _check_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """An optimizer may hold more than the model (a loss with weights, a second model), but something of it."""
    own = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if held and not any(id(p) in own for p in held):
        raise WorkloadError(
            f"optimizer: none of its {len(held)} parameters belongs to the model; it was made for another one, or before "
            "the model was copied. Make it from model.parameters(), or pass a callable such as torch.optim.AdamW"
        )


def _required(fn: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return []
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named if p.default is p.empty]


def _refuse_uncopyable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        what = f"model: {name or 'it'} is a {type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise WorkloadError(
                f"{what}, which is compiled (torch.jit): its calls can't be followed or run again; give the nn.Module that it "
                "was scripted or traced from"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise WorkloadError(
                f"{what}, whose process group can't be copied: plan for model.module, apply the plan to model.module, and go "
                "on training the wrapped model"
            )


def _last_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""


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
    held: list[Any] = field(default_factory=list, repr=False)  # what only weak references of a copy lead to
    # fake tensors and those that they stand for, until a capture knows them
    twins: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)
    inputs: Callable[[Any], Any] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter or buffer; the CPU for a model without any."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def samples(self) -> int:
        """Samples in a micro-batch: the first dimension of the batch's first tensor."""
        first = next((t for t in tensors_of(self.batch) if t.dim() > 0), None)
        return int(first.shape[0]) if first is not None else 1


@dataclass(frozen=True)
class Workload:
    """One training step.

    Args:
        model: the module to train, in the mode (`train()`) it trains in.
        batch: one micro-batch as a loader gives it: the items of a list or tuple are the model's positional arguments,
            those of a mapping keywords; a tensor or another object is the one argument.
        loss: `(output, batch) -> scalar`. Without it a scalar output or an HF-style `.loss` is used. With it, items of the
            batch that `forward` has no argument for (labels) are the loss's alone. A loss module (`nn.CrossEntropyLoss()`) or a function of
            `torch.nn.functional` is called on the output and those items.
            The output is released before backward starts; use `step` for a loop that keeps it.
        optimizer: an instance, a callable from parameters to one, or None (forward and backward only).
        autocast: a dtype, or None.
        accumulate: micro-batches per step; each loss is divided by it.
        step: instead of `loss`: `(model, batch) -> None`, one whole step its own way; the batch may be any object.
        factory: set by `from_factory`; a function that builds the workload when it is needed.
        notes: sentences about defaults that were taken; profiles and plans repeat them.
        inputs: `(batch) -> what the model is called on`, as `batch` itself is without it; `lambda batch: batch[0]`.
        reads: set by `ullage.plan(values=..., assume=...)` and the like: how values are found that the step reads.

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
    notes: tuple[str, ...] = field(default=(), repr=False)
    inputs: Callable[[Any], Any] | None = None
    reads: Reads = field(default_factory=Reads, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.factory is not None:
            return
        if not isinstance(self.model, nn.Module):
            raise WorkloadError(f"model: expected a torch.nn.Module, got {type(self.model).__name__}")
        check_batch(self.batch, self.step)
        if isinstance(self.accumulate, bool) or not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise WorkloadError(f"accumulate: expected a whole number of 1 or more, got {self.accumulate!r}")
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise WorkloadError(f"autocast: expected a torch.dtype or None, got {self.autocast!r}")
        if self.step is not None and (self.loss is not None or self.optimizer is not None or self.accumulate != 1):
            raise WorkloadError("step: does the whole step itself; leave loss, optimizer and accumulate out")
        if self.step is not None and self.inputs is not None:
            raise WorkloadError("step: calls the model itself; leave inputs out")
        for name in ("loss", "step", "inputs"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise WorkloadError(f"{name}: expected a callable, got {getattr(self, name)!r}")
        opt = self.optimizer
        if opt is not None and not isinstance(opt, torch.optim.Optimizer) and not callable(opt):
            raise WorkloadError(f"optimizer: expected an instance, a callable or None, got {type(opt).__name__}")
        if isinstance(opt, torch.optim.Optimizer):
            _check_parameters(opt, self.model)

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
        name = getattr(self.factory, "__name__", repr(self.factory))
        required = _required(self.factory)
        if required:
            raise WorkloadError(
                f"factory {name}: is called without arguments, but asks for {', '.join(required)}; "
                "give them defaults, or wrap it: lambda: factory(...)"
            )
        try:
            built = self.factory()
        except UllageError:
            raise  # says it better
        except Exception as error:
            where = _last_line(error)
            raise WorkloadError(f"factory {name} raised {type(error).__name__}: {error}{where}") from error
        if not isinstance(built, Workload):
            raise WorkloadError(f"factory {name}: expected it to return a ullage.Workload, got {type(built).__name__}")
        return built.build()

    def instance_device(self) -> torch.device:
        """The device of the model's first parameter or buffer."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device("cpu")

    def instance(self) -> Instance:
        """The real thing: the user's own objects (or a fresh build of the factory)."""
        work = self.build()
        optimizer = make_optimizer(work.optimizer, work.model)
        return Instance(
            work.model, work.batch, work.loss, optimizer, work.autocast, work.accumulate, work.step, inputs=work.inputs
        )

    def fake_instance(self, mode: FakeTensorMode, active: Callable[[], AbstractContextManager[None]]) -> Instance:
        """Return a copy on fake tensors; the user's objects are not touched. `active` enters the fake mode and its patches.

        Raises:
            WorkloadError: the model, optimizer or step can't be copied.
        """
        if self.factory is not None:
            with active():
                built = self.build().instance()
            made = (*built.model.parameters(), *built.model.buffers(), *tensors_of(built.batch))
            return built if all(isinstance(t, FakeTensor) for t in made) else _on_fake_tensors(built, mode)
        _refuse_uncopyable(self.model)
        memo: dict[int, Any] = {}
        try:
            with FakeCopyMode(mode):
                copied = Copier(memo)
                model, loss, step = copied(self.model), copied(self.loss), copied(self.step)
                inputs = copied(self.inputs)
                is_instance = isinstance(self.optimizer, torch.optim.Optimizer)
                optimizer: Any = copied(self.optimizer) if is_instance else None
                batch = copied(self.batch)
        except UllageError:  # says it better
            raise
        except Exception as error:
            raise WorkloadError(
                f"the model can't be copied onto fake tensors ({type(error).__name__}: {error}); "
                "build it in a function and use Workload.from_factory(fn)"
            ) from error
        if not is_instance:
            with active():
                optimizer = make_optimizer(self.optimizer, model)
        return Instance(
            model,
            batch,
            loss,
            optimizer,
            self.autocast,
            self.accumulate,
            step,
            copied.weakly_held,
            copied.twins(),
            inputs,
        )


def reading(work: Workload, values: str, assume: Mapping[str, float] | None) -> Workload:
    """Return a workload with its values found so, unless both are left at their defaults."""
    asked = Reads(values, assume or {})
    if asked == Reads() or not isinstance(work, Workload):  # whoever uses the workload refuses another object
        return work
    return replace(work, reads=asked)


def _on_fake_tensors(built: Instance, mode: FakeTensorMode) -> Instance:
    """A factory's instance with fake twins of its real tensors: a batch from outside, weights that a library read past torch (safetensors does)."""
    with FakeCopyMode(mode):
        copied = Copier({})
        names = ("model", "batch", "loss", "optimizer", "step", "inputs")
        parts = {name: copied(getattr(built, name)) for name in names}
    return replace(built, **parts, held=copied.weakly_held, twins=copied.twins())
