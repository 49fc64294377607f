"""Where ullage differs from `torch.utils.checkpoint` on purpose, and what lies outside its guarantee; see docs/runtime.md."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import ullage
from tests.runtime.steps import Wrap, aten, bits, gradients, inputs, ours, plain, selective, torchs

XW = ((4, 4), (4, 4))
sac = functools.partial(
    torchs, context_fn=functools.partial(create_selective_checkpoint_contexts, [aten.mm.default])
)  # torch's selective kind


def _f(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).sin().exp() @ w).cos()


def test_a_generator_of_ones_own() -> None:
    def f(x: Tensor, w: Tensor, generator: torch.Generator) -> Tensor:
        return ((x @ w) * torch.rand(4, 4, generator=generator)).sin().exp() @ w

    def run(call: Wrap) -> Any:
        generator = torch.Generator().manual_seed(7)
        return gradients(lambda x, w: call(f, x, w, generator), inputs(*XW), plain, 3), bits(generator.get_state())

    assert run(ours) == run(plain) != run(torchs)


def test_a_list_that_is_an_argument() -> None:
    def length(call: Wrap) -> int:
        seen: list[Tensor] = []

        def f(x: Tensor, w: Tensor, seen: list[Tensor]) -> Tensor:
            seen.append(x.detach())
            return _f(x, w)

        gradients(lambda x, w: call(f, x, w, seen), inputs(*XW), plain)
        return len(seen)

    assert (length(plain), length(ours), length(torchs)) == (1, 1, 2)


def test_a_parameter_changed_before_backward() -> None:
    def step(call: Wrap) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        out = call(net, torch.ones(2, 4, requires_grad=True)).sum()
        with torch.no_grad():
            net[0].weight.mul_(2)
            net[2].weight.mul_(2)
        out.backward()
        return net[0].weight.grad

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(plain)
    with pytest.raises(ullage.ReplayError, match=r"Sequential: 0\.weight was changed between forward and backward"):
        step(ours)
    assert step(torchs) is not None  # of other values, without a word


def test_an_argument_written_in_the_unit() -> None:
    def step(call: Wrap) -> Any:
        x, w = inputs(*XW)
        (t,) = inputs((4, 4), grad=False)
        call(lambda x, t: (x * t.add_(1)).sin().exp(), x, t).sum().backward()
        return bits(x.grad)

    with pytest.warns(ullage.UllageWarning, match="writes argument 1 in place"):
        assert step(ours) == step(plain)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(torchs)


def test_use_reentrant() -> None:
    x, w = inputs(*XW)
    torchs(_f, x, w)
    ullage.checkpoint(_f, x, w, use_reentrant=False)
    ullage.checkpoint(_f, x, w)
    with pytest.warns(UserWarning, match="use_reentrant parameter should be passed explicitly"):
        torch.utils.checkpoint.checkpoint(_f, x, w)


def test_strides_are_compared() -> None:
    turned = [False]

    def f(x: Tensor, w: Tensor) -> Tensor:
        h = x.exp()
        return (h.t().contiguous().t() if turned[0] else h).sin() * w

    def step(call: Wrap) -> None:
        turned[0] = False
        out = call(f, *inputs(*XW))
        turned[0] = True
        out.sum().backward()

    step(torchs)
    with pytest.raises(ullage.ReplayError, match="strides"):
        step(ours)


_caught: list[int] = []


def test_a_units_own_handlers_see_no_early_stop() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        try:
            return (x @ w).sin().exp()
        except Exception:
            _caught.append(1)
            raise

    for call, times in ((ours, 0), (torchs, 1)):
        _caught.clear()
        gradients(f, inputs(*XW), call)
        assert len(_caught) == times


def test_selective_goes_backward_twice() -> None:
    def twice(call: Wrap) -> Any:
        x, w = inputs(*XW)
        out = call(_f, x, w).sum()
        out.backward(retain_graph=True)
        out.backward()
        return bits(x.grad)

    assert twice(selective) == twice(plain)
    with pytest.raises(RuntimeError, match="backward an extra time"):
        twice(sac)


def test_selective_holds_no_dispatch_mode_in_forward() -> None:
    depths: list[int] = []

    def f(x: Tensor, w: Tensor) -> Tensor:
        depths.append(torch.utils._python_dispatch._len_torch_dispatch_stack())
        return _f(x, w)

    for _ in range(3):
        selective(f, *inputs(*XW)).sum().backward()
    sac(f, *inputs(*XW))
    # the first call makes the log, and one more is looked at; a replay has its mode
    assert [depths[0], depths[-2], depths[-1]] == [1, 0, 1]


# --- hidden state: slots, generators of numpy's own, globals -----------------------------------------------------------


class Slots:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


_global = {"n": 0}


def _hidden(x: Tensor, w: Tensor, where: str, *held: Any) -> Tensor:
    if where == "numpy generator":
        factor = float(held[0].random())
    else:
        state = held[0] if held else None
        if state is None:
            _global["n"] += 1
            factor = float(_global["n"])
        else:
            state.n += 1
            factor = float(state.n)
    return ((x @ w) * factor).sin().exp() @ w


@pytest.mark.parametrize("options", [{}, {"determinism_check": "values"}, {"keep": "matmul_attention"}])
@pytest.mark.parametrize("where", ["slots", "numpy generator", "global"])
def test_state_that_is_no_attribute_changes_once(where: str, options: dict[str, Any]) -> None:
    def run(call: Any) -> Any:
        _global["n"] = 0
        held = {"slots": (Slots(),), "numpy generator": (np.random.default_rng(0),), "global": ()}[where]
        seen = []
        for _ in range(3):
            x, w = inputs(*XW)
            call(_hidden, x, w, where, *held).sum().backward()
            seen.append((bits(x.grad), bits(w.grad), _global["n"], getattr(held[0], "n", 0) if held else 0))
        return seen, held[0].random() if where == "numpy generator" else 0

    assert run(lambda f, *a: ullage.checkpoint(f, *a, **options)) == run(plain)
