"""What a unit reaches through lists, partials, objects, slots, globals and arguments of any container: learnt, checked, put back."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ullage
from tests.runtime.steps import bits
from ullage.runtime.state._survey import Survey

Make = Callable[[list[nn.Module]], Callable[[Tensor], Tensor]]


def _through(modules: Any, x: Tensor) -> Tensor:
    for m in modules:
        x = m(x)
    return x


class Holder:
    __slots__ = ("__dict__", "modules")

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def __call__(self, x: Tensor) -> Tensor:
        return _through(self.modules, x)

    def run(self, x: Tensor) -> Tensor:
        return self(x)


def _nested(modules: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor) -> Tensor:
        return _through(modules, x)

    return lambda x: inner(x)


def _default(modules: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    return lambda x, held=modules: _through(held, x)


def _keyword(modules: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    named = dict(enumerate(modules))

    def unit(x: Tensor, *, held: Any = named) -> Tensor:
        return _through(held.values(), x)

    return unit


WAYS: dict[str, Make] = {
    "closure": lambda ms: lambda x: _through(ms, x),
    "function in a function": _nested,
    "partial": lambda ms: functools.partial(_through, ms),
    "partial of a partial": lambda ms: functools.partial(functools.partial(_through), tuple(ms)),
    "default": _default,
    "keyword default": _keyword,
    "bound method": lambda ms: Holder(ms).run,
    "object": Holder,
    "deque": lambda ms: functools.partial(_through, collections.deque(ms)),
}
way = pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)


@way
@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_segments_made_by_one_function_share_nothing(make: Make, keep: str | None) -> None:
    def run(call: Callable[..., Tensor]) -> Any:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(8)
        segments = [[nn.Linear(8, 8), nn.Tanh()], [nn.Linear(8, 8), nn.Tanh()], [nn.Linear(8, 8), norm]]
        x = torch.randn(16, 8, requires_grad=True)
        for _ in range(3):
            h = x
            for modules in segments:
                h = call(make(modules), h)
            h.square().sum().backward()
        return int(norm.num_batches_tracked), bits(norm.running_mean), bits(norm.running_var), bits(x.grad)

    assert run(lambda f, h: ullage.checkpoint(f, h, keep=keep)) == run(lambda f, h: f(h))


@way
def test_a_parameter_behind_a_container_is_checked_at_every_call(make: Make) -> None:
    modules = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()]
    for _ in range(3):
        y = ullage.checkpoint(make(modules), torch.randn(2, 4, requires_grad=True))
        with torch.no_grad():
            modules[2].weight.mul_(3)
        with pytest.raises(ullage.ReplayError, match=r"weight was changed between forward and backward"):
            y.sum().backward()


def test_torchs_checkpoint_sequential_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.utils.checkpoint as torchs

    def run(sequential: Callable[[nn.Sequential, Tensor], Tensor]) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(8, 8), nn.BatchNorm1d(8))])
        for _ in range(2):
            x = torch.ones(4, 8).cumsum(0).requires_grad_()
            sequential(model, x).square().sum().backward()
        return [bits(t) for t in (*model.state_dict().values(), *[p.grad for p in model.parameters()])]

    want = run(lambda model, x: model(x))
    monkeypatch.setattr(torchs, "checkpoint", ullage.checkpoint)
    assert run(lambda model, x: torchs.checkpoint_sequential(model, 3, x, use_reentrant=False)) == want


class MyList(list):
    pass


class MyDict(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(str(key), value)


@dataclasses.dataclass
class Items:
    items: list[Any]


class Slots:
    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Any] = []


class Deeper:
    def __init__(self) -> None:
        self.inner = collections.deque([Items([])], maxlen=3)

    @property
    def items(self) -> list[Any]:
        return self.inner[0].items


def _put(c: Any, value: Any) -> None:
    if isinstance(c, np.ndarray):
        c[0] += 1
    elif isinstance(c, dict):
        c[len(c)] = value
    elif isinstance(c, set):
        c.add(len(c))
    else:
        getattr(c, "items", c).append(value)


def _count(c: Any) -> int:
    if isinstance(c, np.ndarray):
        return int(c[0])
    return len(c) if isinstance(c, dict) else len(getattr(c, "items", c))


MAKERS: dict[str, Callable[[], Any]] = {
    "list": list,
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda: collections.defaultdict(list),
    "list subclass": MyList,
    "dict subclass": MyDict,
    "deque": collections.deque,
    "set": set,
    "dataclass": lambda: Items([]),
    "slots": Slots,
    "object": Deeper,
    "ndarray": lambda: np.zeros(2),
}
MODULE = nn.Linear(4, 4)
GLOBAL: dict[str, Any] = {}


def _unit(x: Tensor, c: Any) -> Tensor:
    y = MODULE(x).sin()
    _put(c, y.detach())
    return y.cos() * _count(c)


class Keeper(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c = c

    def forward(self, x: Tensor) -> Tensor:
        return _unit(x, self.c)


PLACES: dict[str, Callable[[Any], tuple[Callable[..., Tensor], tuple[Any, ...]]]] = {
    "argument": lambda c: (_unit, (c,)),
    "in an argument": lambda c: (lambda x, held: _unit(x, held["c"][0]), ({"c": (c,)},)),
    "closure": lambda c: (lambda x: _unit(x, c), ()),
    "attribute": lambda c: (Keeper(c), ()),
    "global": lambda c: (lambda x: _unit(x, GLOBAL["c"]), ()),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_container_is_changed_once(kind: str, place: str) -> None:
    def run(call: Callable[..., Tensor]) -> Any:
        seen = []
        for _ in range(3):
            c = GLOBAL["c"] = MAKERS[kind]()
            f, args = PLACES[place](c)
            x = torch.linspace(0, 1, 8).view(2, 4).requires_grad_()
            call(f, x, *args).sum().backward()
            seen.append((_count(c), bits(x.grad)))
        return seen

    assert run(ullage.checkpoint) == run(lambda f, *args: f(*args))


# --- arguments without a graph are the caller's own objects --------------------------------------------------------------


def test_a_replay_is_given_the_same_objects() -> None:
    weight, marked, plain = nn.Parameter(torch.randn(4, 4)), torch.randn(4), torch.randn(4)
    marked.scale = 3.0
    x = torch.randn(2, 4, requires_grad=True)
    seen: list[tuple[bool, ...]] = []

    class Notes(ullage.runtime.Apart):  # no state of the unit's
        def take(self, *found: bool) -> None:
            seen.append(found)

    notes = Notes()

    def unit(x: Tensor, w: Tensor, m: Tensor, p: Tensor, again: Any) -> Tensor:
        notes.take(type(w) is nn.Parameter, w is weight, m is marked, p is plain, again["w"] is w)
        return ((x @ w).sin() * m * getattr(m, "scale", 1.0) + p).exp()

    (want,) = torch.autograd.grad(unit(x, weight, marked, plain, {"w": weight}).sum(), x)
    seen.clear()
    for _ in range(2):
        out = ullage.checkpoint(unit, x, weight, marked, plain, {"w": weight})
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad, want)
    assert seen == [(True,) * 5] * 4
    assert weight.grad is None


def test_an_argument_that_gets_a_graph_later() -> None:
    x, w = torch.randn(2, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    buffer = torch.ones(2, 4)
    y = ullage.checkpoint(lambda x, b: ((x @ w) * b).sin().exp(), x, buffer)
    buffer.add_(x)  # now part of a graph, and of another version
    with pytest.raises(ullage.ReplayError, match="argument 1 was changed"):
        (y.sum() + buffer.sum()).backward()


_relu = torch.ops.aten.relu


def test_tables_of_torch_ops_are_not_walked() -> None:
    # ops are globals of many models, and lead to torch's decompositions and all that these close over
    seen = list(Survey([lambda x: _relu(x)])._seen.values())
    assert not [o for o in seen if isinstance(o, torch._ops.OperatorBase | torch._ops.OpOverloadPacket)]
    assert len(seen) < 4
