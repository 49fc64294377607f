"""What the public documentation of `torch.utils.checkpoint` promises, with ullage's in its place."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import namedtuple
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as tc
from torch import Tensor, nn

import ullage
from tests.runtime.steps import aten, bits, gradients, inputs, ours, plain, selective, state, steps, torchs, unit
from ullage.runtime import Site

WRAPS = {"torch": torchs, "full": ours, "selective": selective}
every = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
both = pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
XW = ((4, 4), (4, 4))


def same(fn: Any, shapes: Any, wrap: Any, n: int = 3) -> None:
    assert gradients(fn, inputs(*shapes), wrap, n) == gradients(fn, inputs(*shapes), plain, n)


# --- arguments -------------------------------------------------------------------------------------------------------


@every
def test_arguments_that_are_no_tensors(wrap: Any) -> None:
    def f(x: Tensor, scale: float, name: str, flag: bool, nothing: None, dim: int = 0) -> Tensor:
        assert (name, flag, nothing) == ("sin", True, None)
        return getattr(torch, name)(x * scale).sum(dim)

    def g(x: Tensor) -> Tensor:
        return wrap(f, x, 2.5, "sin", True, None, dim=1)

    same(g, ((4, 4),), plain)
    out = g(*(x := inputs((4, 4))))
    out.sum().backward()
    assert torch.equal(x[0].grad, 2.5 * torch.cos(x[0] * 2.5))


Pair = namedtuple("Pair", ["a", "b"])


@both
def test_nested_arguments(wrap: Any) -> None:
    def f(bag: dict[str, Any], pair: Pair, *, extra: list[Any]) -> Tensor:
        return (bag["x"] @ bag["more"][0]).sin() * pair.a.exp() + extra[0][0] * pair.b

    def g(call: Any) -> Any:
        a, b, c, d = inputs(*[(4, 4)] * 4)
        for _ in range(2):
            out = call(f, {"x": a, "more": [b, 3]}, Pair(c, 2.0), extra=[(d, None)])
            out.square().sum().backward()
        return bits(out), [bits(t.grad) for t in (a, b, c, d)]

    assert g(wrap) == g(plain)


@both
def test_a_plain_object_with_tensors(wrap: Any) -> None:
    @dataclasses.dataclass
    class Batch:
        x: Tensor
        n: int

    def f(batch: Batch, w: Tensor) -> Tensor:
        return (batch.x @ w).sin() * batch.n @ w

    same(lambda x, w: wrap(f, Batch(x * 1, 3), w), XW, plain)
    a = gradients(lambda x, w: wrap(f, Batch(x, 3), w), inputs(*XW), plain)
    assert a == gradients(lambda x, w: f(Batch(x, 3), w), inputs(*XW), plain)


# --- outputs ---------------------------------------------------------------------------------------------------------


@every
def test_outputs_of_any_kind(wrap: Any) -> None:
    @dataclasses.dataclass
    class Out:
        y: Tensor
        z: Tensor | None

    def f(x: Tensor, how: str) -> Any:
        y = torch.exp(x).sin()
        kinds = {"dict": {"y": y, "n": 1}, "dataclass": Out(y, None), "tuple": (y, None, [y.cos()]), "none": None}
        return kinds[how]

    for how, get in {
        "dict": lambda o: o["y"],
        "dataclass": lambda o: o.y,
        "tuple": lambda o: o[2][0],
        "none": lambda o: None,
    }.items():
        (x,) = inputs((4, 4))
        (z,) = inputs((4, 4))
        out, truth = wrap(f, x, how), f(z, how)
        assert type(out) is type(truth)
        if how != "none":
            get(out).sum().backward()
            get(truth).sum().backward()
            assert bits(x.grad) == bits(z.grad)


@both
def test_views_and_aliases_in_and_out(wrap: Any) -> None:
    def f(x: Tensor, w: Tensor) -> Any:
        y = x.t()
        return x, y[1:], (y @ w).sin().view(-1)[:4], w[0]

    same(f, XW, wrap)
    x, w = inputs(*XW)
    out = wrap(f, x, w)
    assert out[0] is x
    assert out[1].untyped_storage()._cdata == x.untyped_storage()._cdata

    def of_a_view(x: Tensor, w: Tensor) -> Tensor:
        return wrap(lambda v, u: (v * u).exp() @ u.exp(), x.t()[1:3], w.view(2, 2, 4)[0])

    def truth(x: Tensor, w: Tensor) -> Tensor:
        v, u = x.t()[1:3], w.view(2, 2, 4)[0]
        return (v * u).exp() @ u.exp()

    shapes = ((2, 4), (4, 4))
    with pytest.raises(RuntimeError):
        truth(*inputs(*shapes))  # the shapes don't fit: both say so
    with pytest.raises(RuntimeError):
        of_a_view(*inputs(*shapes))

    def views(x: Tensor, w: Tensor, call: Any) -> Tensor:
        return call(lambda v, u: (v * u).exp() @ u.t().exp(), x.t()[1:3], w.view(2, 2, 4)[0])

    a = gradients(functools.partial(views, call=wrap), inputs(*XW), plain, 2)
    assert a == gradients(functools.partial(views, call=plain), inputs(*XW), plain, 2)


# --- who needs gradients ---------------------------------------------------------------------------------------------


@every
def test_inputs_without_grad(wrap: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU())
    x = torch.randn(3, 4)
    net(x).sum().backward()
    truth = [bits(p.grad) for p in net.parameters()]
    for _ in range(3):
        net.zero_grad()
        wrap(net, x).sum().backward()
        assert [bits(p.grad) for p in net.parameters()] == truth


@both
def test_nothing_needs_grad(wrap: Any) -> None:
    (x,) = inputs((4, 4), grad=False)
    out = wrap(lambda x: x.sin() @ x, x)
    assert not out.requires_grad and torch.equal(out, x.sin() @ x)
    with torch.no_grad():
        assert not wrap(nn.Linear(4, 4), x).requires_grad


class Lora(nn.Module):
    """A frozen matmul with a trainable low-rank addition."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.base(x) + self.b(self.a(x)))


@both
def test_frozen_parameters(wrap: Any) -> None:
    def loss(model: nn.Module, call: Any) -> Tensor:
        x = torch.randn(4, 8)
        for layer in model:
            x = call(layer, x)
        return x.square().sum()

    make = lambda: nn.Sequential(Lora(), Lora())  # noqa: E731
    assert steps(make, loss, wrap) == steps(make, loss, plain)


def test_requires_grad_that_changes_between_steps() -> None:
    model = Lora()
    x = torch.randn(4, 8)
    for n, frozen in enumerate((True, False, False, True)):
        model.base.requires_grad_(not frozen)
        seen = []
        for call in (plain, ours, selective):
            model.zero_grad()
            stale = call is selective and n in (1, 3)
            with pytest.warns(ullage.UllageWarning, match="stale") if stale and n == 1 else nullcontext():
                call(model, x).square().sum().backward()
            seen.append([bits(p.grad) for p in model.parameters()])
        assert seen[0] == seen[1] == seen[2]


# --- nesting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("kinds", ["full", "selective", "mixed", "torch outside", "torch inside"])
def test_nested(depth: int, kinds: str) -> None:
    order = {
        "full": [ours],
        "selective": [selective],
        "mixed": [ours, selective],
        "torch outside": [torchs, ours, selective],
        "torch inside": [ours, torchs],
    }[kinds]

    def level(d: int, x: Tensor, w: Tensor, nest: bool) -> Tensor:
        x = (x @ w).sin()
        if d:
            call = order[(depth - d) % len(order)] if nest else plain
            x = call(functools.partial(level, d - 1, nest=nest), x, w)
        return torch.dropout(x, 0.3, True).exp() @ w

    def run(nest: bool) -> Any:
        torch.manual_seed(0)
        return gradients(lambda x, w: level(depth, x, w, nest), inputs(*XW), plain, 3), bits(torch.get_rng_state())

    assert run(True) == run(False)


# --- ways of going backward ------------------------------------------------------------------------------------------


def _f(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).sin().exp() @ w).tanh() * x


@both
def test_two_backwards(wrap: Any) -> None:
    def twice(call: Any) -> Any:
        x, w = inputs(*XW)
        for _ in range(2):
            out = call(_f, x, w).sum()
            out.backward(retain_graph=True)
            out.backward()
        return bits(x.grad), bits(w.grad)

    assert twice(wrap) == twice(plain)


@both
def test_an_extra_backward_raises_as_plain_does(wrap: Any) -> None:
    for call in (plain, wrap):
        x, w = inputs(*XW)
        out = call(_f, x, w).sum()
        out.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.backward()


@both
def test_grad_of_a_part(wrap: Any) -> None:
    def parts(call: Any) -> Any:
        x, w = inputs(*XW)
        h = x.sin()
        y = call(_f, h, w)
        z = call(_f, y, w).sum()
        (a,) = torch.autograd.grad(z, y, retain_graph=True)
        (b,) = torch.autograd.grad(z, h, retain_graph=True)
        (c,) = torch.autograd.grad(y, w, a, retain_graph=True)
        z.backward(inputs=[x])
        return [bits(t) for t in (a, b, c, x.grad, w.grad)]

    for _ in range(3):
        assert parts(wrap) == parts(plain)


@both
def test_double_backward(wrap: Any) -> None:
    def second(call: Any) -> Any:
        x, w = inputs(*XW)
        (g,) = torch.autograd.grad(call(_f, x, w).sum(), x, create_graph=True)
        (g.square().sum() + call(_f, x, g).sum()).backward()
        return bits(g), bits(x.grad), bits(w.grad)

    for _ in range(3):
        assert second(wrap) == second(plain)


@every
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("retain", [True, False])
def test_backward_inside_the_forward(wrap: Any, early_stop: bool, retain: bool) -> None:
    """Both examples of torch's Rule 6."""

    def keeps(x: Tensor) -> Any:
        z = x.sin().cos()
        (gx,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
        return gx, z

    def lets_go(x: Tensor) -> Any:
        z = x.sin().cos()
        (gx,) = torch.autograd.grad(z.sum(), x)
        return x.cos() * gx

    f = keeps if retain else lets_go
    call = functools.partial(wrap, early_stop=early_stop)
    for _ in range(3):
        a, b = inputs((4, 4)), inputs((4, 4))
        out, truth = call(f, *a), f(*b)
        assert bits(out) == bits(truth)
        for o, x in ((out, a[0]), (truth, b[0])):
            (o[1] if retain else o).sum().backward()
            assert x.grad is not None
        assert bits(a[0].grad) == bits(b[0].grad)


def test_graph_exec_group() -> None:
    """Several backwards over disjoint parts of one unit's graph: one replay."""
    if not hasattr(tc, "GraphExecGroup"):
        pytest.skip("this torch has no GraphExecGroup")

    def f(x: Tensor, y: Tensor) -> Any:
        return x.sin().cos().exp(), y.exp().sin().cos()

    for group, replays in ((True, 1), (False, 2)):
        site = Site("unit")
        x, y = inputs(*XW)
        a, b = unit(site, None)(f, x, y)
        with tc.GraphExecGroup() if group else torch.enable_grad():
            a.sum().backward()
            b.sum().backward()
        u, v = inputs(*XW)
        sum(o.sum() for o in f(u, v)).backward()
        assert (bits(x.grad), bits(y.grad)) == (bits(u.grad), bits(v.grad))
        assert site.replays == replays


@both
def test_backwards_of_one_group_must_not_overlap(wrap: Any) -> None:
    if not hasattr(tc, "GraphExecGroup"):
        pytest.skip("this torch has no GraphExecGroup")
    for call in (torchs, wrap):
        x, w = inputs(*XW)
        out = call(_f, x, w).sum()
        with tc.GraphExecGroup():
            out.backward(retain_graph=True)
            with pytest.raises(tc.CheckpointError, match="GraphExecGroup"):
                out.backward(retain_graph=True)
        x.grad = None
        with tc.GraphExecGroup():  # another one
            out.backward()
        (y, v) = inputs(*XW)
        _f(y, v).sum().backward()
        assert bits(x.grad) == bits(y.grad)


@both
def test_hooks_on_tensors(wrap: Any) -> None:
    def hooked(call: Any) -> Any:
        seen: list[Any] = []
        x, w = inputs(*XW)

        def f(x: Tensor, w: Tensor) -> Tensor:
            h = (x @ w).sin()
            h.register_hook(lambda g: g * 2)
            return h.exp() @ w

        x.register_hook(lambda g: seen.append(bits(g)))
        x.register_post_accumulate_grad_hook(lambda p: seen.append(bits(p.grad)))
        y = call(f, x, w)
        y.register_hook(lambda g: g + 1)
        y.sum().backward()
        return seen, bits(x.grad), bits(w.grad)

    for _ in range(3):
        assert hooked(wrap) == hooked(plain)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_two_models_in_two_threads() -> None:
    def train(call: Any, n: int, into: dict[int, Any]) -> None:
        generator = torch.Generator().manual_seed(n)
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
        for p in model.parameters():
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) / 3)
        seen = []
        for _ in range(10):
            model.zero_grad()
            x = torch.randn(4, 8, generator=generator)
            for layer in model:
                x = call(lambda t, layer=layer: layer(t).tanh().exp(), x)
            x.sum().backward()
            seen.append(state(model)[0])
        into[n] = seen

    truth: dict[int, Any] = {}
    for n in (1, 2):
        train(plain, n, truth)
    for call in (ours, selective):
        found: dict[int, Any] = {}
        threads = [threading.Thread(target=train, args=(call, n, found)) for n in (1, 2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert found == truth
        assert not ullage.is_recomputing()


def test_levels_are_those_of_the_docs() -> None:
    with pytest.raises(ullage.ArgumentError, match=r"keep='matmul': expected one of 'matmul_attention'"):
        ullage.checkpoint(_f, *inputs(*XW), keep="matmul")
    with pytest.raises(ullage.ArgumentError, match=r"did you mean aten\.mm\.default"):
        ullage.checkpoint(_f, *inputs(*XW), keep=[aten.mm])
