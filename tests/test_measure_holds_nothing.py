"""What `measure` notes of the user's state costs no byte: a step that replaces something frees it, as it does unmeasured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from ullage.measure import _measure
from ullage.measure._state import preserved_rng


class Slotted:
    __slots__ = ("feature",)


class OfClass:
    feature: ClassVar[Any] = None


class Two(NamedTuple):
    h: Any
    c: Any


FEATURE: Any = None


class Replaces(nn.Module):
    """Puts a detached copy of what it computes somewhere, early in its forward."""

    def __init__(self, put: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.first, self.second, self.put = nn.Linear(64, 64), nn.Linear(64, 256), put
        self.plain, self.slotted, self.list, self.dict = SimpleNamespace(), Slotted(), [None, [None]], {"x": {}}
        self.register_buffer("kept", None)
        self.cell = self._cell()

    def _cell(self) -> Callable[[Tensor], None]:
        feature = None

        def put(h: Tensor) -> None:
            nonlocal feature
            feature = h

        return put

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        self.put(self, h.detach() + 1)
        return self.second(h).square().mean()


def _global(m: Any, h: Tensor) -> None:
    global FEATURE
    FEATURE = h


HOLDERS: dict[str, Callable[[Any, Tensor], None]] = {
    "attribute": lambda m, h: setattr(m, "feature", h),
    "buffer": lambda m, h: setattr(m, "kept", h),
    "plain object": lambda m, h: setattr(m.plain, "feature", h),
    "slot": lambda m, h: setattr(m.slotted, "feature", h),
    "list": lambda m, h: m.list.__setitem__(0, h),
    "list in a list": lambda m, h: m.list[1].__setitem__(0, h),
    "dict in a dict": lambda m, h: m.dict["x"].__setitem__("h", h),
    "cell": lambda m, h: m.cell(h),
    "class": lambda m, h: setattr(OfClass, "feature", h),
    "global": _global,
    "tuple": lambda m, h: setattr(m, "hidden", (h, h + 1)),
    "named tuple": lambda m, h: setattr(m, "hidden", Two(h, (h + 1, 3))),
    "tensor's attribute": lambda m, h: setattr(m.first.weight, "momentum", h),
}


def _peaks(put: Callable[[Any, Tensor], None]) -> tuple[list[int], ul.Workload]:
    torch.manual_seed(0)
    work = ul.Workload(Replaces(put), torch.randn(512, 64))
    work.model(work.batch).backward()
    work.model.zero_grad()
    return ul.measure(work, steps=1).step_peaks, work


@pytest.mark.parametrize("name", HOLDERS)
def test_bytes_are_those_of_steps_of_which_nothing_is_noted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def nothing(inst: Any) -> Iterator[Any]:
        with preserved_rng():
            yield SimpleNamespace(grads=[], let_go=lambda: None)

    noted, _ = _peaks(HOLDERS[name])
    with monkeypatch.context() as patched:
        patched.setattr(_measure, "preserved", nothing)
        plain, _ = _peaks(HOLDERS[name])
    assert noted == plain
    assert max(noted) > 512 * 256 * 4


def test_containers_that_are_replaced_are_freed_from_the_second_step_on() -> None:
    lists, work = _peaks(lambda m, h: setattr(m, "features", [h]))
    tensors, _ = _peaks(lambda m, h: setattr(m, "feature", h))
    assert lists[1:] == tensors[1:]
    assert work.model.features[0].shape == (512, 64)  # type: ignore[index,union-attr]


def test_a_tensor_that_was_replaced_comes_back() -> None:
    torch.manual_seed(0)
    work = ul.Workload(Replaces(HOLDERS["attribute"]), torch.randn(512, 64))
    model: Any = work.model
    model.feature = torch.arange(6.0).reshape(2, 3).t()
    model.feature.note = "mine"
    model.view = model.feature[0]
    ul.measure(work, steps=1)
    assert model.feature.tolist() == [[0, 3], [1, 4], [2, 5]] and model.feature.stride() == (1, 3)
    assert model.feature.note == "mine"
    model.feature[0, 1] = 7.0
    assert model.view.tolist() == [0, 7]  # it is in the same memory as before
