"""Batches as loaders give them: lists, dicts, named tuples, nested ones, objects. What is planned and run is the plain step."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ullage as ul


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Sized(nn.Module):
    """Takes whatever form of batch `reads` understands."""

    def __init__(self, reads: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
        self.head, self.reads = nn.Linear(16, 3), reads

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.head(self.body(self.reads(*args, **kwargs)))
        return out


class OnlyX(Sized):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


X, Y = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3


def from_loader(make: Callable[[Tensor, Tensor], Any]) -> Any:
    """One batch of a DataLoader over samples of that form, collated by torch where torch knows how."""
    return next(iter(DataLoader([make(x, y) for x, y in zip(X, Y, strict=True)], batch_size=64)))  # type: ignore[arg-type]


def loss_of(labels: Callable[[Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    return lambda out, batch: F.cross_entropy(out, labels(batch))


def step_of(parts: Callable[[Any], tuple[Any, Tensor]]) -> Callable[[nn.Module, Any], None]:
    def step(model: nn.Module, batch: Any) -> None:
        given, labels = parts(batch)
        F.cross_entropy(model(given), labels).backward()

    return step


FORMS: dict[str, Callable[[], ul.Workload]] = {
    "tuple": lambda: ul.Workload(OnlyX(lambda x: x), (X, Y), loss=loss_of(lambda b: b[1])),
    "list": lambda: ul.Workload(OnlyX(lambda x: x), from_loader(lambda x, y: [x, y]), loss=loss_of(lambda b: b[1])),
    "named tuple": lambda: ul.Workload(OnlyX(lambda x: x), from_loader(Pair), loss=loss_of(lambda b: b.y)),
    "dict": lambda: ul.Workload(
        OnlyX(lambda x: x), from_loader(lambda x, y: {"x": x, "y": y}), loss=loss_of(lambda b: b["y"])
    ),
    "mapping": lambda: ul.Workload(OnlyX(lambda x: x), UserDict(x=X, y=Y), loss=loss_of(lambda b: b["y"])),
    "nested": lambda: ul.Workload(
        Sized(lambda views, labels: views["a"][0]),
        from_loader(lambda x, y: [{"a": [x, x + 1]}, y]),
        loss=loss_of(lambda b: b[1]),
    ),
    "object": lambda: ul.Workload(Sized(lambda batch: batch.x), Sample(X, Y), loss=loss_of(lambda b: b.y)),
    "object with slots": lambda: ul.Workload(Sized(lambda batch: batch.x), Slotted(X, Y), loss=loss_of(lambda b: b.y)),
    "list, own step": lambda: ul.Workload(Sized(lambda x: x), [X, Y], step=step_of(tuple)),
    "dict with names, own step": lambda: ul.Workload(
        Sized(lambda x: x), {"x": X, "y": Y, "name": "a", "n": 3}, step=step_of(lambda b: (b["x"], b["y"]))
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_batch_is_planned_and_exact(form: str) -> None:
    work = FORMS[form]()
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert any(d.action == "recompute" for d in plan.decisions), plan
    assert ul.verify(work, plan, steps=1).ok
    assert ul.measure(work, plan, steps=1).peak_bytes == plan.predicted.peak_bytes


def test_a_step_that_writes_to_a_tensor_in_an_object_of_the_batch_leaves_it_as_found() -> None:
    sample = Sample(X.clone(), Y)

    def step(model: nn.Module, batch: Any) -> None:
        batch[0].x.mul_(2)
        F.cross_entropy(model(batch[0].x), batch[0].y).backward()

    work = ul.Workload(Sized(lambda x: x), [sample], step=step)
    ul.profile(work, costs="roofline")
    ul.measure(work, steps=1)
    assert torch.equal(sample.x, X)


def test_what_no_forward_takes_is_refused_by_name() -> None:
    model = OnlyX(lambda x: x)
    with pytest.raises(
        ul.WorkloadError,
        match=r"called as model\(\*batch\), which OnlyX.forward\(x\) does not take: too many positional",
    ):
        ul.profile(ul.Workload(model, [X, Y]), costs="roofline")
    with pytest.raises(ul.WorkloadError, match=r"model\(\*\*batch\).*missing a required argument: 'x'.*the loss alone"):
        ul.profile(ul.Workload(model, {"y": Y}, loss=loss_of(lambda b: b["y"])), costs="roofline")


@pytest.mark.parametrize(
    "batch", [DataLoader(TensorDataset(X, Y)), TensorDataset(X, Y), iter([X]), [1, "a"], {}, None, 3]
)
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(ul.WorkloadError, match=f"^batch: expected .*, got {type(batch).__name__}"):
        ul.Workload(OnlyX(lambda x: x), batch)


class Masked(OnlyX):
    """Its second argument is no target."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x if mask is None else x * mask)


class Focal(nn.Module):
    """A loss module of one's own."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target).square()


LOSSES: dict[str, Callable[[], ul.Workload]] = {
    "a module and a tuple": lambda: ul.Workload(OnlyX(lambda x: x), (X, Y), loss=nn.CrossEntropyLoss()),
    "a function": lambda: ul.Workload(OnlyX(lambda x: x), [X, Y], loss=F.cross_entropy),
    "a partial": lambda: ul.Workload(
        OnlyX(lambda x: x), [X, Y], loss=functools.partial(F.cross_entropy, label_smoothing=0.1)
    ),
    "a module of one's own": lambda: ul.Workload(OnlyX(lambda x: x), (X, Y), loss=Focal()),
    "a dict": lambda: ul.Workload(OnlyX(lambda x: x), {"x": X, "name": "a", "y": Y}, loss=nn.CrossEntropyLoss()),
    "an input of several": lambda: ul.Workload(
        OnlyX(lambda x: x), {"x": X, "labels": Y, "weights": X}, loss=nn.CrossEntropyLoss()
    ),
    "inputs": lambda: ul.Workload(
        Masked(lambda x: x), (X, Y), loss=nn.CrossEntropyLoss(), inputs=lambda batch: batch[0]
    ),
    "inputs by name": lambda: ul.Workload(
        Masked(lambda x: x),
        {"image": X, "y": Y},
        loss=lambda out, b: F.cross_entropy(out, b["y"]),
        inputs=lambda batch: {"x": batch["image"]},
    ),
    "the batch itself": lambda: ul.Workload(
        nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)), X, loss=nn.MSELoss()
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_take_targets(name: str) -> None:
    work = LOSSES[name]()
    assert ul.profile(work, costs="roofline").peak_bytes == ul.measure(work, steps=1).peak_bytes


def test_a_target_that_the_forward_takes_is_explained() -> None:
    with pytest.raises(
        ul.WorkloadError,
        match=r"CrossEntropyLoss takes .*Masked.forward\(x, mask\) .*inputs=lambda batch: batch\[0\]",
    ):
        ul.measure(ul.Workload(Masked(lambda x: x), (X, X), loss=nn.CrossEntropyLoss()), steps=1)
