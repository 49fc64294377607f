"""One tensor that is given as several arguments is one tensor in a replay too."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ullage as ul
from ullage.runtime.unit import _inputs


def steps(call: Any, model: nn.Module) -> list[Tensor]:
    found = []
    for k in range(3):
        model.zero_grad()
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(k)).requires_grad_()
        call(x * 2).square().mean().backward()
        assert x.grad is not None
        found += [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("keep", [None, "matmul_attention", "addmm[0]"])
@pytest.mark.parametrize("weights", [False, True])
def test_attention(keep: str | None, weights: bool) -> None:
    """torch's projects the three in one matmul if query, key and value are the same object."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def plain(h: Tensor) -> Tensor:
        return attention(h, h, h, need_weights=weights)[0]  # type: ignore[no-any-return]

    def ours(h: Tensor) -> Tensor:
        return ul.checkpoint(attention, h, h, h, need_weights=weights, keep=keep)[0]  # type: ignore[no-any-return]

    wanted, found = steps(plain, attention), steps(ours, attention)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("older", [False, True], ids=["this torch", "torch 2.11"])
@pytest.mark.parametrize("outer", ["ullage", "torch"])
@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_attention_in_an_outer_checkpoint(
    outer: str, keep: str | None, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the inner unit holds, it holds as saved tensors of the outer one, also where torch can't make one by itself."""
    if older:
        monkeypatch.setattr(_inputs, "make_saved_tensor", None)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def inner(h: Tensor) -> Tensor:
        h = h.sin()
        return ul.checkpoint(attention, h, h, h, need_weights=False, keep=keep)[0] + h  # type: ignore[no-any-return]

    def ours(h: Tensor) -> Any:
        return ul.checkpoint(inner, h) if outer == "ullage" else checkpoint(inner, h, use_reentrant=False)

    def plain(h: Tensor) -> Tensor:
        h = h.sin()
        return attention(h, h, h, need_weights=False)[0] + h  # type: ignore[no-any-return]

    wanted, found = steps(plain, attention), steps(ours, attention)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize(
    "given", [lambda h: (h, [h], {"k": h}), lambda h: (h, (2 * h,), {"k": h}), lambda h: (h, [2 * h], {})]
)
def test_in_lists_and_dicts(given: Any) -> None:
    layer = nn.Linear(16, 16)

    def f(a: Tensor, b: Any, c: dict[str, Tensor]) -> Tensor:
        out = layer(a).tanh() * (a if b[0] is a else b[0].exp())
        return out + (a.sin() if c.get("k") is a else a.cos())

    wanted, found = (
        steps(lambda h, call=call: call(f, *given(h)), layer) for call in (lambda f, *a: f(*a), ul.checkpoint)
    )
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_plan_of_attention_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x, x, x, need_weights=False)[0]
            return x

    torch.manual_seed(0)
    work = ul.Workload(Net(), torch.randn(2, 32, 16), loss=lambda out, _: out.square().mean())
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert {d.action for d in plan.decisions} == {"recompute"}
    assert ul.verify(work, plan, steps=2).ok


def test_they_are_let_go_without_the_collector() -> None:
    """What holds one of them is no cycle."""
    layer = nn.Linear(16, 16)
    x = torch.ones(2, 16)
    ul.checkpoint(lambda a, b: layer(a) * b, x, x).sum().backward()  # the first call learns
    gc.collect()
    gc.disable()
    try:
        before = _held()  # after failed backwards of other tests some graphs hold themselves
        for _ in range(3):
            ul.checkpoint(lambda a, b: layer(a) * b, x, x).sum().backward()
        assert _held() == before
    finally:
        gc.enable()


_around: list[torch.Tensor] = []


def test_what_a_global_held_during_the_call_is_not_held_by_it() -> None:
    """Written to later, it holds the graph that holds the call: a cycle that no collector sees."""
    layer = nn.Linear(4, 4)

    def step() -> None:
        h = layer(torch.ones(2, 4))
        _around.append(h)
        out = ul.checkpoint(lambda x: (layer(x) + _around[0]).tanh(), torch.ones(2, 4))
        _around.clear()
        h += out  # and no backward

    step()
    gc.collect()
    before = _held()
    for _ in range(3):
        step()
    gc.collect()
    assert _held() == before


def _held() -> int:
    return sum(type(o) is _inputs.Held for o in gc.get_objects())


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("keep", [None, "cos[0]"])
@pytest.mark.parametrize("parts", ["chunk", "split", "unbind"])
def test_a_view_that_no_op_may_use_is_handed_on(parts: str, keep: str | None, hooks: bool) -> None:
    """Torch refuses any look at the graph of a view from `chunk` whose base was written to; a unit may still be given one."""

    def step(call: Any, uses: bool) -> Tensor:
        x = torch.arange(12.0).reshape(4, 3).requires_grad_()
        h = x.sin()
        first, *_ = h.unbind(0) if parts == "unbind" else getattr(h, parts)(2)
        h.mul_(2.0)

        def unit(h: Tensor, part: Tensor) -> Tensor:
            return h.cos().exp() + (part.sum() if uses else 0)

        with torch.autograd.graph.saved_tensors_hooks(_same, _same) if hooks else nullcontext():
            call(unit, h, first).sum().backward()
        assert x.grad is not None
        return x.grad

    def ours(unit: Any, *args: Tensor) -> Tensor:
        return ul.checkpoint(unit, *args, keep=keep)  # type: ignore[no-any-return]

    assert torch.equal(step(lambda unit, *args: unit(*args), False), step(ours, False))
    with pytest.raises(RuntimeError, match="is a view and its base or another view of its base has been modified"):
        step(ours, True)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("keep", [None, "cos[0]"])
@pytest.mark.parametrize("parts", ["chunk", "split", "unbind"])
def test_a_view_that_no_op_may_use_is_given_back(parts: str, keep: str | None, nested: bool) -> None:
    """A unit may return one, too; nobody needs to use it."""

    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.nn.functional.rrelu(x.cos(), training=True) + 1
        first, *_ = h.unbind(0) if parts == "unbind" else getattr(h, parts)(2)
        h.mul_(2.0)
        return h.exp(), first

    def step(call: Any) -> list[Tensor]:
        torch.manual_seed(0)
        found: list[Tensor] = []
        for _ in range(3):
            x = torch.arange(12.0).reshape(4, 3).requires_grad_()
            y, _part = call(lambda x: call(unit, x), x) if nested else call(unit, x)
            y.sum().backward()
            assert x.grad is not None
            found.append(x.grad)
        return found

    def ours(unit: Any, *args: Tensor) -> Any:
        return ul.checkpoint(unit, *args, keep=keep)

    wanted, found = step(lambda unit, *args: unit(*args)), step(ours)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def _same(t: Tensor) -> Tensor:
    return t
