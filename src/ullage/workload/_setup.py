"""The facts of a step that its bytes and seconds depend on: model, batch, dtypes, optimizer and device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import torch
from torch import Tensor

from ullage._bytes import format_bytes
from ullage.workload._batch import tensors_of
from ullage.workload._workload import Instance

_SHOWN = 4  # tensors of the batch that are named


class Setup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The facts of a step that its bytes and seconds depend on. `str(setup)` is a few lines.

    Attributes:
        model: class of the model.
        parameters: how many numbers its parameters have; shared ones count once.
        trained: those that require grad.
        dtypes: dtypes of the parameters, the one of most numbers first.
        batch: samples in a micro-batch: the first dimension of the batch's first tensor.
        shapes: tensors of the batch, such as "input_ids 2 x 128 int64".
        sequence: length of the sequence, if the batch has indices of shape batch x length; None otherwise.
        accumulate: micro-batches per step.
        autocast: its dtype, or "".
        optimizer: class of the optimizer; "" if the workload names none.
        optimizer_bytes: bytes of its state after a step.
        device: name of the device.
        memory_bytes: its memory, without its context; None if it is not known.
        defaults: sentences about what was taken because nothing else was asked for.
    """

    model: str
    parameters: int
    trained: int
    dtypes: list[str]
    batch: int
    shapes: list[str]
    sequence: int | None
    accumulate: int
    autocast: str
    optimizer: str
    optimizer_bytes: int
    device: str
    memory_bytes: int | None
    defaults: list[str]

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The facts as (name, text)."""
        frozen = "" if self.trained == self.parameters else f", {_count(self.trained)} of them trained"
        model = (
            f"{self.model}, {_count(self.parameters)} parameters in {' and '.join(self.dtypes) or 'no dtype'}{frozen}"
        )
        sequence = f", sequence {self.sequence:,}" if self.sequence is not None else ""
        times = f" x {self.accumulate} micro-batches" if self.accumulate > 1 else ""
        batch = f"{self.batch:,}{times}{sequence}, autocast {self.autocast or 'off'}"
        per = self.optimizer_bytes / self.trained if self.trained else 0.0
        optimizer = f"{self.optimizer}, {per:.2f} bytes of state per trained parameter" if self.optimizer else "none"
        memory = f", {format_bytes(self.memory_bytes)}" if self.memory_bytes is not None else ""
        return [("model", model), ("batch", batch), ("optimizer", optimizer), ("device", f"{self.device}{memory}")]

    def fits(self, peak_bytes: int) -> str:
        """Whether a step of this peak fits the device, in words: "yes, 41 % of h200" or "no, 4.7 x h200"."""
        if self.memory_bytes is None:
            return f"not known: the memory of {self.device} is not"
        share = peak_bytes / self.memory_bytes
        if share > 1:  # rounded up: a step just above the memory is no "1.0 x"
            return f"no, {math.ceil(share * 10) / 10:.1f} x {self.device}"
        shown = f"{share * 100:.0f} %" if share >= 0.01 else "less than 1 %"
        return f"yes, {shown} of {self.device}"

    def __str__(self) -> str:
        return "\n".join(f"  {name:<10} {text}" for name, text in self.lines)


def setup_of(inst: Instance, device: str, memory_bytes: int | None, defaults: Iterable[str]) -> Setup:
    """The facts of an instance that has run a step, on a device of this name with this memory."""
    parameters = list(inst.model.parameters())
    sizes: Counter[str] = Counter()
    for p in parameters:
        sizes[_dtype(p.dtype)] += p.numel()
    named = _named(inst.batch)
    indices = next((t for _, t in named if t.dim() == 2 and t.dtype in (torch.int32, torch.int64)), None)
    return Setup(
        model=type(inst.model).__name__,
        parameters=sum(sizes.values()),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        dtypes=[name for name, _ in sizes.most_common()],
        batch=inst.samples,
        shapes=[" ".join(filter(None, [n, " x ".join(map(str, t.shape)), _dtype(t.dtype)])) for n, t in named[:_SHOWN]],
        sequence=int(indices.shape[1]) if indices is not None else None,
        accumulate=inst.accumulate,
        autocast=_dtype(inst.autocast) if inst.autocast is not None else "",
        optimizer=type(inst.optimizer).__name__ if inst.optimizer is not None else "in the step" if inst.step else "",
        optimizer_bytes=_state_bytes(inst.optimizer),
        device=device,
        memory_bytes=memory_bytes,
        defaults=list(defaults),
    )


def _state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of an optimizer's state; a tensor that is there twice counts once."""
    if optimizer is None:
        return 0
    found = {id(t): t.numel() * t.element_size() for state in optimizer.state.values() for t in tensors_of(state)}
    return sum(found.values())


def _named(batch: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a batch, with the names that a mapping gives them."""
    if hasattr(batch, "items"):
        return [
            (str(name) if isinstance(name, str) else "", t) for name, value in batch.items() for t in tensors_of(value)
        ]
    return [("", t) for t in tensors_of(batch)]


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(n: int) -> str:
    """A number of parameters: 8.03 B, 124.4 M, 512 K or 96."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= factor:
            return f"{n / factor:.3g} {unit}"
    return str(n)
