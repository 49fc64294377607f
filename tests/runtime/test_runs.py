"""Units recomputed together: a run holds one input, and a sweep makes its units' inputs; runs contain runs to any depth."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage
from tests.runtime.steps import bits, frames
from ullage.runtime import Apart, Options, Place, Site, Trail, run

Nested = Sequence[Any]  # of items: a unit's number, (number, "record"), or a run, again a sequence


def places(items: Nested, depth: int = 0) -> dict[int, Place]:
    """Units' places: an item that is a run starts where its first unit does."""
    found: dict[int, Place] = {}
    for item in items:
        first = len(found)
        if isinstance(item, list):
            inner = places(item, depth + 1)
            for k, (u, place) in enumerate(sorted(inner.items())):
                found[u] = Place(depth, place.item, place.records) if k == 0 else place
        else:
            u, records = item if isinstance(item, tuple) else (item, "")
            found[u] = Place(depth, depth, records == "record")
        assert len(found) > first
    return found


def with_feeds(found: dict[int, Place]) -> list[Place]:
    last = len(found) - 1
    return [Place(p.depth, p.item, p.records, u < last and found[u + 1].depth > 0) for u, p in sorted(found.items())]


class _Log(Apart):
    """No state of a unit's: no replay puts it back."""

    def __init__(self) -> None:
        self.forwards: Counter[int] = Counter()


_log = _Log()


class Layer(nn.Module):
    """Draws, changes a buffer, returns a tuple."""

    def __init__(self, u: int) -> None:
        super().__init__()
        self.linear, self.norm, self.u = nn.Linear(8, 8), nn.BatchNorm1d(8), u

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, None]:
        _log.forwards[self.u] += 1
        return x + F.dropout(torch.tanh(self.norm(self.linear(x)) * scale), 0.3), None


class Chain(nn.Module):
    def __init__(self, n: int, where: list[Place] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(u) for u in range(n))
        self.where, trail = where, Trail()
        self.sites = [Site(f"layer {u}", trail=trail) for u in range(n)]

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        for u, layer in enumerate(self.layers):
            if self.where is None:
                x = layer(x, scale)[0]
            else:
                x = run(self.sites[u], Options(place=self.where[u]), layer, (x, scale), {})[0]
        return x


def train(model: Chain, steps: int = 3) -> list[Any]:
    seen: list[Any] = []
    for step in range(steps):
        torch.manual_seed(step)
        x, scale = torch.randn(6, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        _log.forwards.clear()
        loss = model(x, scale).square().sum()
        loss.backward()
        seen.append(
            [bits(t) for t in (loss, x.grad, scale.grad, *model.buffers(), *(p.grad for p in model.parameters()))]
        )
        seen.append(bits(torch.get_rng_state()))
        model.zero_grad(set_to_none=True)
    return seen


SCHEDULES: dict[str, tuple[int, Nested, list[int]]] = {
    # units, runs, forwards of each unit in a step: its own, its replay, and the sweeps that pass it
    "single": (3, [0, 1, 2], [2, 2, 2]),
    "one run": (4, [[0, 1, 2, 3]], [3, 3, 3, 2]),
    "one run, recorded": (4, [[(0, "record"), (1, "record"), (2, "record"), 3]], [2, 2, 2, 2]),
    "two runs": (5, [[0, 1, 2], [3, 4]], [3, 3, 2, 3, 2]),
    "run in run": (5, [[0, [1, 2, 3], 4]], [3, 4, 4, 3, 2]),
    "run that starts a run": (5, [[[0, 1, 2], 3, 4]], [4, 4, 3, 3, 2]),
    "three deep": (6, [[[[0, 1], 2], [3, 4]], 5], [5, 4, 3, 3, 2, 2]),
    "recorded in a run in a run": (5, [[[(0, "record"), 1, 2], 3, 4]], [3, 4, 3, 3, 2]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_state_and_forwards(name: str) -> None:
    n, items, forwards = SCHEDULES[name]
    before = frames()
    where = with_feeds(places(items))
    model = Chain(n, where)
    plain = Chain(n, None)
    wanted = train(plain)
    assert train(model) == wanted
    assert [_log.forwards[u] for u in range(n)] == forwards
    del model
    assert frames() == before


def test_inputs_of_a_run_are_not_held() -> None:
    """Between forward and backward only the first input of a run is alive; of a run in a run, too."""
    for items, alive in (([0, 1, 2, 3], 4), ([[0, 1, 2, 3]], 1), ([[0, 1], [2, 3]], 2), ([0, [1, [2, 3]]], 2)):
        model = Chain(4, with_feeds(places(items)))
        for _ in range(2):
            refs: list[weakref.ref[Any]] = []
            hooks = [
                m.linear.register_forward_pre_hook(lambda _, a, r=refs: r.append(weakref.ref(a[0].untyped_storage())))
                for m in model.layers
            ]
            x = torch.randn(6, 8, requires_grad=True)
            out = model(x, torch.ones(8))
            for hook in hooks:
                hook.remove()
            assert sum(r() is not None for r in refs) == alive
            out.sum().backward()
            assert sum(r() is not None for r in refs) == 1  # x


def test_what_is_not_the_output_of_the_unit_before_is_held() -> None:
    class Between(Chain):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            for u, layer in enumerate(self.layers):
                x = (
                    layer(x, scale)[0]
                    if self.where is None
                    else run(self.sites[u], Options(place=self.where[u]), layer, (x, scale), {})[0]
                )
                x = x.add_(1) if u == 0 else x * 2 if u == 1 else x
            return x

    where = with_feeds(places([[0, 1, 2, 3]]))
    assert train(Between(4, where)) == train(Between(4, None))


def test_a_parameter_changed_on_the_way_is_an_error() -> None:
    model = Chain(3, with_feeds(places([[0, 1, 2]])))
    out = model(torch.randn(6, 8), torch.ones(8, requires_grad=True)).sum()
    with torch.no_grad():
        model.layers[0].linear.weight.mul_(2)
    with pytest.raises(ullage.ReplayError, match=r"layer 0: linear\.weight was changed between forward and backward"):
        out.backward()


def test_several_backwards_and_a_part_of_the_graph() -> None:
    def step(model: Chain) -> list[Any]:
        torch.manual_seed(3)
        x, scale = torch.randn(6, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        loss = model(x, scale).square().sum()
        (one,) = torch.autograd.grad(loss, model.layers[1].linear.weight, retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        return [bits(t) for t in (one, x.grad, scale.grad, *(p.grad for p in model.parameters()))]

    for items in ([[0, 1, 2, 3]], [[0, [1, (2, "record")], 3]]):
        model = Chain(4, with_feeds(places(items)))
        plain = Chain(4, None)
        for _ in range(2):
            assert step(model) == step(plain)


def test_an_error_on_the_way_leaves_nothing() -> None:
    before = frames()
    model = Chain(4, with_feeds(places([[0, 1, (2, "record"), 3]])))
    train(model, 1)
    out = model(torch.randn(6, 8), torch.ones(8, requires_grad=True)).sum()
    hook = model.layers[2].linear.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        out.backward()
    hook.remove()
    del out
    model.zero_grad(set_to_none=True)
    assert frames() == before
    fresh = Chain(4, None)
    fresh.load_state_dict(model.state_dict())
    assert train(model) == train(fresh)
