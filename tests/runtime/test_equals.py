"""Units with sparse tensors, `torch.func` inside, lazy modules and `torch.cond`: the plain step's bits, at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import ullage
from tests.runtime.steps import bits

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "keep": {"keep": "matmul_attention"},
    "all": {"keep": lambda op: True},
    "values": {"determinism_check": "values"},
}


class Graph(nn.Module):
    """A graph convolution: its adjacency is a buffer, a closed-over tensor or an argument."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        dense = torch.eye(6) + torch.eye(6).roll(1, 0)
        self.register_buffer("adjacency", dense.to_sparse() if layout == "coo" else dense.to_sparse_csr())
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.adjacency @ self.linear(x).sin()).exp()


class Tangent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, tangent = torch.func.jvp(lambda t: self.linear(t).sin(), (x,), (x.cos(),))
        return (out + tangent).exp()


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sin().exp()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "coo": lambda: Graph("coo"),
    "csr": lambda: Graph("csr"),
    "jvp": Tangent,
    "lazy": Lazy,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:Tangent. a stale op log")  # jvp's zeros; what it dropped is rebuilt in full
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_as_the_plain_step(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    def run(call: Callable[..., Tensor]) -> Any:
        torch.manual_seed(0)
        model, seen = make(), []
        for _ in range(3):
            x = torch.linspace(0, 1, 24).view(6, 4).requires_grad_()
            call(model, x).square().mean().backward()
            seen.append([bits(x.grad), *[bits(p.grad) for p in model.parameters()]])
            model.zero_grad()
        return seen

    assert run(lambda f, x: ullage.checkpoint(f, x, **options)) == run(lambda f, x: f(x))


def test_a_lazy_module_is_kept_at_the_call_that_makes_its_parameters() -> None:
    model = Lazy()
    x = torch.ones(2, 3, requires_grad=True)
    replays = []
    for _ in range(3):
        before = ullage.runtime.totals.replays
        ullage.checkpoint(model, x).sum().backward()
        replays.append(ullage.runtime.totals.replays - before)
    assert replays == [0, 1, 1]


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, of what it imports
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_cond(options: dict[str, Any]) -> None:
    w = torch.linspace(-1, 1, 16).view(4, 4).requires_grad_()

    def unit(x: Tensor) -> Tensor:
        h = (x @ w).sin()
        return torch.cond(h.sum() > 0, lambda t: t.cos(), lambda t: t.exp(), (h,)).sin()

    def run(call: Callable[..., Tensor]) -> Any:
        seen = []
        for sign in (1.0, -1.0):
            w.grad = None
            x = (sign * torch.linspace(0, 1, 8).view(2, 4)).requires_grad_()
            call(unit, x).sum().backward()
            seen.append((bits(x.grad), bits(w.grad)))
        return seen

    assert run(lambda f, x: ullage.checkpoint(f, x, **options)) == run(lambda f, x: f(x))


@pytest.mark.parametrize(
    "options", [{}, {"keep": "matmul_attention"}, {"debug": True}], ids=["full", "selective", "debug"]
)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_sparse_products_under_autocast(options: dict[str, Any], inside: bool) -> None:
    """Autocast casts in the kernel of `torch.sparse.mm`, which a dispatch mode takes out of its reach."""
    adjacency = (torch.eye(6) + torch.eye(6).roll(1, 0)).to_sparse()
    seen: list[torch.dtype] = []

    def product(x: Tensor) -> Tensor:
        y = torch.sparse.mm(adjacency, x.detach())  # its own backward is one that torch refuses here
        seen.append(y.dtype)
        return y.float() * x

    def unit(x: Tensor, other: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside or torch.is_autocast_enabled("cpu")):
            y = product(x).sin().exp()
        with torch.autocast("cpu", enabled=False):
            return (y * product(x).sin()).sum() + other.exp().sum() * 0

    def step(call: Callable[..., Tensor], change: bool) -> Any:
        x, other = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_(), torch.zeros(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            y = call(unit, x, other)
        if change:  # the replay then follows ops in a mode of its own
            other.add_(1)
        y.backward()
        return bits(y), bits(x.grad)

    for change in (False, True, False):
        plain = step(lambda f, *a: f(*a), False)
        assert seen == [torch.bfloat16, torch.float32]
        seen.clear()
        assert step(lambda f, *a: ullage.checkpoint(f, *a, **options), change) == plain
        assert seen == [torch.bfloat16, torch.float32]  # a replay leaves the list as it was
        seen.clear()


class Scaled(Tensor):
    """A subclass that only Python's functions know."""


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_parameter_of_a_subclass(options: dict[str, Any]) -> None:
    w = nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4).as_subclass(Scaled))

    def run(call: Callable[..., Tensor]) -> Any:
        seen = []
        for _ in range(3):
            w.grad = None
            x = torch.linspace(0, 1, 8).view(2, 4).requires_grad_()
            call(lambda x: (x.sin() @ w).as_subclass(Tensor).tanh(), x).sum().backward()
            seen.append((bits(x.grad), bits(w.grad)))
        return seen

    assert run(lambda f, x: ullage.checkpoint(f, x, **options)) == run(lambda f, x: f(x))


_RING = torch.eye(6) + torch.eye(6).roll(1, 0)
HELD: dict[str, Callable[[], Tensor]] = {
    "coo": lambda: _RING.to_sparse(),
    "csr": lambda: _RING.to_sparse_csr(),
    "csc": lambda: _RING.to_sparse_csc(),
    "two tensors": lambda: TwoTensor(_RING, _RING),
    "jagged": lambda: torch.nested.nested_tensor_from_jagged(torch.ones(6, 4), torch.tensor([0, 2, 6])),
}


@pytest.mark.filterwarnings("ignore")  # sparse CSR is in beta; Dynamo's own, of what jagged tensors import
@pytest.mark.parametrize("where", ["closed over", "argument"])
@pytest.mark.parametrize("kind", HELD)
def test_tensors_without_one_storage(kind: str, where: str) -> None:
    held = HELD[kind]()

    def product(x: Tensor, held: Tensor) -> Tensor:
        if kind == "jagged":
            return (torch.nested.nested_tensor_from_jagged(x.sin(), held.offsets()) * held).values().exp()
        if kind == "two tensors":
            return x.sin().exp() * held.a.sum()
        return (held @ x.sin()).exp()

    def run(call: Callable[..., Tensor]) -> Any:
        seen = []
        for _ in range(3):
            x = torch.linspace(0, 1, 24).view(6, 4).requires_grad_()
            out = call(product, x, held) if where == "argument" else call(lambda x: product(x, held), x)
            out.square().mean().backward()
            seen.append((bits(out), bits(x.grad)))
        return seen

    truth = run(lambda f, *a: f(*a))
    for options in WAYS.values():
        assert run(lambda f, *a, options=options: ullage.checkpoint(f, *a, **options)) == truth
