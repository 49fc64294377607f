"""A replay stops before its forward puts back what it changed in containers, plain objects, classes, modules."""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ullage
from tests.runtime.steps import Wrap, gradients, inputs, ours, plain, selective, steps, unit
from ullage.runtime import Site

ways = pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])


class Slotted:
    __slots__ = ("depth", "stack")

    def __init__(self) -> None:
        self.depth, self.stack = 0, [[1]]


class ClassDepth:
    depth = 0
    stack: ClassVar[list[int]] = []

    @classmethod
    def enter(cls) -> int:
        cls.depth += 1
        cls.stack.append(cls.depth)
        return cls.depth

    @classmethod
    def leave(cls) -> None:
        cls.stack.pop()
        cls.depth -= 1


class OfClass(ClassDepth):
    """Inherits its counter."""


@dataclass
class Data:
    depth: int = 0
    names: dict[str, set[int]] = field(default_factory=lambda: {"a": {1}})


class Bag(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("by update only")


depth = 0
LIST: list[Any] = [[0]]


class State:
    """One of each kind."""

    def __init__(self) -> None:
        self.list: list[Any] = [3, [4]]
        self.deque: deque[Any] = deque([1, 2], maxlen=3)
        self.set = {1, 2}
        self.dict: dict[Any, Any] = {"a": 1, "b": {"c": 2}}
        self.default: defaultdict[str, list[int]] = defaultdict(list)
        self.ordered = OrderedDict(a=1, b=2)
        self.counter: Counter[str] = Counter(a=1)
        self.slotted, self.data, self.names, self.bag = Slotted(), Data(), SimpleNamespace(n=0), Bag(a=1)
        self.array, self.numbers, self.bytes = np.zeros(3), array("i", [1, 2]), bytearray(b"ab")


class HalfWay(nn.Module):
    """Changes something, saves its last tensor, and puts it back without `finally`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear, self.other = kind, nn.Linear(4, 4), nn.Linear(4, 4)
        self.state = State()
        self.register_buffer("large", torch.zeros(5000))
        self.stacks: list[list[int]] = [[], [], []]
        self.calls = 0
        self.fixed = nn.Parameter(torch.ones(4), requires_grad=False)
        if kind == "closure":
            self.closure = self._closure()

    def _closure(self) -> Callable[[int], int]:
        level = 0

        def step(by: int) -> int:
            nonlocal level
            level += by
            return level

        return step

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(self.linear(x).tanh())  # type: ignore[no-any-return]

    def list_append(self, h: Tensor) -> Tensor:
        self.state.list.append(h)
        h = (h * len(self.state.list)).exp()
        self.state.list.pop()
        return h

    def nested_list(self, h: Tensor) -> Tensor:
        self.state.list[1].append(2)
        h = (h * sum(self.state.list[1])).exp()
        del self.state.list[1][-1]
        return h

    def deque_rotated(self, h: Tensor) -> Tensor:
        self.state.deque.rotate(1)
        h = (h * self.state.deque[0]).exp()
        self.state.deque.rotate(-1)
        return h

    def set_added(self, h: Tensor) -> Tensor:
        self.state.set.add(9)
        h = (h * len(self.state.set)).exp()
        self.state.set.discard(9)
        return h

    def dict_entry(self, h: Tensor) -> Tensor:
        self.state.dict["b"]["h"] = h
        h = (h * len(self.state.dict["b"])).exp()
        del self.state.dict["b"]["h"]
        return h

    def default_entry(self, h: Tensor) -> Tensor:
        self.state.default["x"].append(1)
        h = (h * len(self.state.default["x"])).exp()
        self.state.default.clear()
        return h

    def order(self, h: Tensor) -> Tensor:
        self.state.ordered.move_to_end("a")
        h = (h * next(iter(self.state.ordered.values()))).exp()
        self.state.ordered.move_to_end("b")
        return h

    def counted(self, h: Tensor) -> Tensor:
        self.state.counter["a"] += 1
        h = (h * self.state.counter["a"]).exp()
        self.state.counter["a"] -= 1
        return h

    def slots(self, h: Tensor) -> Tensor:
        self.state.slotted.depth += 1
        self.state.slotted.stack[0].append(1)
        h = (h * self.state.slotted.depth * len(self.state.slotted.stack[0])).exp()
        self.state.slotted.stack[0].pop()
        self.state.slotted.depth -= 1
        return h

    def dataclass(self, h: Tensor) -> Tensor:
        self.state.data.depth += 1
        self.state.data.names["a"].add(5)
        h = (h * self.state.data.depth * len(self.state.data.names["a"])).exp()
        self.state.data.names["a"].remove(5)
        self.state.data.depth -= 1
        return h

    def namespace(self, h: Tensor) -> Tensor:
        self.state.names.n += 1
        h = (h * self.state.names.n).exp()
        self.state.names.n -= 1
        return h

    def subclass(self, h: Tensor) -> Tensor:
        self.state.bag.update(b=2)
        h = (h * len(self.state.bag)).exp()
        self.state.bag.pop("b")
        return h

    def arrays(self, h: Tensor) -> Tensor:
        self.state.array[0] += 1
        self.state.numbers.append(3)
        self.state.bytes.append(1)
        h = (h * float(self.state.array[0]) * len(self.state.numbers) * len(self.state.bytes)).exp()
        self.state.array[0] -= 1
        self.state.numbers.pop()
        self.state.bytes.pop()
        return h

    def class_attribute(self, h: Tensor) -> Tensor:
        h = (h * OfClass.enter() * len(ClassDepth.stack)).exp()
        OfClass.leave()
        return h

    def own_class(self, h: Tensor) -> Tensor:
        type(self).level = getattr(type(self), "level", 0) + 1  # type: ignore[attr-defined]
        h = (h * self.level).exp()  # type: ignore[operator]
        del type(self).level  # type: ignore[attr-defined]
        return h

    def default_argument(self, h: Tensor, stack: list[int] = []) -> Tensor:  # noqa: B006
        stack.append(1)
        h = (h * len(stack)).exp()
        stack.pop()
        return h

    def _global(self, h: Tensor) -> Tensor:
        global depth
        depth += 1
        LIST[0].append(1)
        h = (h * depth * len(LIST[0])).exp()
        LIST[0].pop()
        depth -= 1
        return h

    def closure(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def modules_swapped(self, h: Tensor) -> Tensor:
        first, second = self.linear, self.other
        self.linear = second
        h = self.linear(h).exp()
        self.linear = first
        return h

    def hooked(self, h: Tensor) -> Tensor:
        handle = self.other.register_forward_hook(lambda m, a, out: out * 2)
        h = self.other(h).exp()
        handle.remove()
        return h

    def buffer(self, h: Tensor) -> Tensor:
        self.large += 1
        h = (h * float(self.large[0])).exp()
        self.large -= 1
        return h

    def parameter_swapped(self, h: Tensor) -> Tensor:
        was = self.fixed
        self.fixed = nn.Parameter(was * 2, requires_grad=False)
        h = (h * self.fixed).exp()
        self.fixed = was
        return h

    def another_each_time(self, h: Tensor) -> Tensor:
        stack = self.stacks[self.calls % 3]
        stack.append(1)
        self.calls += 1
        h = (h * sum(map(len, self.stacks))).exp()
        stack.pop()
        return h

    def cycle(self, h: Tensor) -> Tensor:
        self.state.list.append(self.state.list)
        h = (h * len(self.state.list)).exp()
        self.state.list.pop()
        return h


KINDS = [
    "list_append", "nested_list", "deque_rotated", "set_added", "dict_entry", "default_entry", "order", "counted", "slots", "dataclass",
    "namespace", "subclass", "arrays", "class_attribute", "own_class", "default_argument", "_global", "modules_swapped", "hooked",
    "buffer", "parameter_swapped", "another_each_time", "cycle",
]  # fmt: skip


def _content(model: HalfWay) -> Any:
    s = model.state
    return [
        list(s.list), list(s.list[1]), list(s.deque), set(s.set), str(s.dict), dict(s.default), list(s.ordered), dict(s.counter), s.slotted.depth,
        str(s.slotted.stack), str(s.data), s.names.n, dict(s.bag), s.array.tolist(), s.numbers.tolist(), bytes(s.bytes), ClassDepth.depth,
        list(ClassDepth.stack), hasattr(HalfWay, "level"), "depth" in vars(OfClass), depth, str(LIST), list(model._modules.values()).index(model.linear),
        len(model.other._forward_hooks), float(model.large.sum()), float(model.fixed.sum()), str(model.stacks), HalfWay.default_argument.__defaults__,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    globals()["depth"] = 0
    LIST[:] = [[0]]
    ClassDepth.depth = 0
    ClassDepth.stack.clear()
    for cls, name in ((OfClass, "depth"), (HalfWay, "level")):
        with contextlib.suppress(AttributeError):
            delattr(cls, name)
    HalfWay.default_argument.__defaults__[0].clear()  # type: ignore[index]


def _seen(kind: str, wrap: Wrap) -> Any:
    seen: list[Any] = []

    def loss(model: HalfWay, call: Wrap) -> Tensor:
        x = torch.randn(2, 4)
        first, second = call(model, x), call(model, x * 2)  # two calls before the first replay
        seen.append(str(_content(model)))
        (first.sum() + second.sum()).backward()
        seen.append(str(_content(model)))
        return call(model, torch.randn(2, 4)).sum()  # type: ignore[no-any-return]

    return steps(lambda: HalfWay(kind), loss, wrap), seen


@ways
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_forward_puts_back_itself(kind: str, wrap: Wrap) -> None:
    ours_seen = _seen(kind, wrap)
    as_it = _seen(kind, plain)
    assert ours_seen == as_it


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_a_unit_in_a_unit(keep: str | None) -> None:
    """Each replay stops in both."""

    class Outer(nn.Module):
        def __init__(self, call: Wrap) -> None:
            super().__init__()
            self.call, self.inner, self.stack = call, HalfWay("slots"), deque([0])

        def forward(self, x: Tensor) -> Tensor:
            self.stack.append(1)
            x = self.call(self.inner, x.sin()) * len(self.stack)
            self.stack.pop()
            return x.exp()

    def run(call: Wrap) -> Any:
        seen = []

        def loss(model: Outer, _: Wrap) -> Tensor:
            out = call(model, torch.randn(2, 4)).sum()
            out.backward()
            seen.append((list(model.stack), _content(model.inner)))
            return call(model, torch.randn(2, 4)).sum()  # type: ignore[no-any-return]

        return steps(lambda: Outer(call), loss, plain), str(seen)

    assert run(lambda f, *a: ullage.checkpoint(f, *a, keep=keep)) == run(plain)


@pytest.mark.filterwarnings("ignore:.*a stale op log")
@ways
def test_errors_that_the_unit_handles_or_not(wrap: Wrap) -> None:
    stack: list[int] = []
    fail = [False]

    def f(x: Tensor, w: Tensor) -> Tensor:
        stack.append(1)
        try:
            stack.append(2)
            raise KeyError
        except KeyError:
            h = (x @ w * len(stack)).sin()
        if fail[0]:
            raise RuntimeError("in the replay")
        h = h.exp()
        del stack[:]
        return h

    x, w = inputs((4, 4), (4, 4))
    out = wrap(f, x, w).sum()
    fail[0] = True
    stack.append(7)
    with pytest.raises(RuntimeError, match="in the replay"):
        out.backward()
    assert stack == [7]
    stack.clear()
    fail[0] = False
    assert gradients(f, [x, w], wrap, 3) == gradients(f, [x, w], plain, 3)
    assert stack == []


def test_what_leaves_nothing_is_looked_at_once() -> None:
    site, (x, w) = Site("unit"), inputs((4, 4), (4, 4))
    for _ in range(3):
        unit(site, None)(lambda x, w: (x @ w).sin().exp(), x, w).sum().backward()
    assert list(site.leaves.values()) == [False]


class Stale(nn.Module):
    """Its second call runs other ops than its first, so that call's log is stale; state is half-way where its replays stop."""

    def __init__(self) -> None:
        super().__init__()
        self.average: dict[str, Tensor] = {}
        self.stack: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.average["x"] = self.average["x"] * 0.5 + 1 if self.average else torch.ones(())
        x = x * self.average["x"]
        self.stack.append(1)
        out = x.tanh() * (1 + 0.1 * len(self.stack))
        self.stack.pop()
        return out


def test_a_replay_that_a_stale_log_ends_says_nothing_of_what_stopping_leaves() -> None:
    """The next call's replay stops where the failed one was to stop, and is looked at as the first that does."""
    found = []
    for keep in (None, "matmul_attention"):
        model = Stale()
        for step in range(4):
            x = torch.arange(1.0, 5.0).mul(step + 1).requires_grad_()
            if keep is None:
                model(x.sin()).sum().backward()
            elif step == 1:
                with pytest.warns(ullage.UllageWarning, match="a stale op log"):
                    ullage.checkpoint(model, x.sin(), keep=keep).sum().backward()
            else:
                ullage.checkpoint(model, x.sin(), keep=keep).sum().backward()
            assert model.stack == []
            found.append(x.grad)
    assert all(torch.equal(a, b) for a, b in zip(found[:4], found[4:], strict=True))
