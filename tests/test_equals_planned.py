"""Constructs that `ullage.checkpoint` knows, under plans: the plain step's bits, or an error that names the cause and a remedy that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import ullage as ul

WIDTH = 8


class Block(nn.Module):
    """A block whose forward is given."""

    def __init__(self, forward: Callable[[Block, Tensor], Tensor], layout: str = "") -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), forward
        if layout:
            ring = torch.eye(WIDTH) + torch.eye(WIDTH).roll(1, 0)
            self.register_buffer("ring", ring.to_sparse() if layout == "coo" else ring.to_sparse_csr())

    def body(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class Adjoint(torch.autograd.Function):
    """Its backward runs a unit of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (x @ w).tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = ul.checkpoint(lambda x, w: (x @ w).tanh(), x, w)
        return torch.autograd.grad(y, (x, w), grad)


def _penalty(block: Block, x: Tensor) -> Tensor:
    y = block.body(x)
    (grad,) = torch.autograd.grad(y.sum(), block.a.weight, create_graph=True)
    return y + grad.square().mean()


def _called(block: Block, x: Tensor) -> Tensor:
    doubled = {k: v * 2 for k, v in block.a.named_parameters()}
    return block.b(F.gelu(torch.func.functional_call(block.a, doubled, (x,))))


RIGHT: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "adjoint Function": lambda block, x: block.body(x) + Adjoint.apply(x, block.a.weight[:WIDTH]),
    "gradient penalty": _penalty,
    "vmap": lambda block, x: block.body(x) + torch.func.vmap(torch.sin)(x),
    "grad": lambda block, x: block.body(x) + torch.func.grad(lambda t: t.sin().sum())(x),
    "functional_call": _called,
    "a unit in it": lambda block, x: ul.checkpoint(block.body, x),
}


def _work(how: Callable[[Block, Tensor], Tensor], layout: str = "") -> ul.Workload:
    torch.manual_seed(0)
    return ul.Workload(nn.Sequential(*[Block(how, layout) for _ in range(3)]), torch.randn(WIDTH, WIDTH), loss=_loss)


def _loss(out: Tensor, _: Tensor) -> Tensor:
    return out.square().mean()


@pytest.mark.parametrize("name", RIGHT)
def test_as_the_plain_step(name: str) -> None:
    work = _work(RIGHT[name])
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert ul.verify(work, plan, steps=2).ok


def _rows(block: Block, x: Tensor) -> Tensor:
    return block.body(torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 3, WIDTH]))).values()


def _tangents(block: Block, x: Tensor) -> Tensor:
    return torch.func.jvp(block.body, (x,), (torch.ones_like(x),))[1]


def _branches(block: Block, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda t: block.body(t).sin(), lambda t: block.body(t).cos(), (x,))


REFUSED: dict[str, tuple[Callable[[Block, Tensor], Tensor], str, str]] = {
    "sparse buffer": (lambda block, x: torch.sparse.mm(block.ring, block.body(x)), "coo", r"buffer 0\.ring is a sparse tensor"),
    "CSR buffer": (lambda block, x: block.ring @ block.body(x), "csr", r"buffer 0\.ring is a sparse_csr tensor"),
    "sparse inside": (lambda block, x: torch.sparse.mm(x.to_sparse(), x), "", "layout torch.sparse_coo is used.*use a dense tensor"),
    "jagged": (_rows, "", r"jagged"),
    "jvp": (_tangents, "", "forward-mode derivatives .* without a plan"),
    "cond": (_branches, "", "a higher-order op .* goes its way by values"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, of what it imports; sparse CSR is in beta
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_planned(name: str) -> None:
    how, layout, match = REFUSED[name]
    with pytest.raises(ul.UllageError, match=match):
        ul.plan(_work(how, layout), policy="every_block", costs="roofline")


def test_parameters_of_a_class_with_ops_of_its_own() -> None:
    work = _work(lambda block, x: block.body(x) @ block.w)
    for block in work.model:
        block.w = nn.Parameter(TwoTensor(torch.eye(WIDTH), torch.eye(WIDTH)))
    with pytest.raises(ul.CaptureError, match=r"^0\.w is a TwoTensor, a subclass of Tensor .* without a plan"):
        ul.plan(work, policy="every_block", costs="roofline")


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LazyLinear(WIDTH), nn.LazyLinear(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


def test_lazy_modules_are_called_once_before() -> None:
    model, x = nn.Sequential(*[Lazy() for _ in range(3)]), torch.randn(WIDTH, WIDTH)
    work = ul.Workload(model, x, loss=_loss)
    with pytest.raises(ul.WorkloadError, match=r"model: 0\.a\.weight has no shape yet.*call the model once"):
        ul.plan(work, policy="every_block", costs="roofline")
    model(x)  # what the message says
    assert ul.verify(work, ul.plan(work, policy="every_block", costs="roofline"), steps=2).ok


class _Activated(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(16, 64), nn.Linear(64, 16), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))  # type: ignore[no-any-return]


def test_blocks_of_one_class_with_other_functions_share_no_log() -> None:
    torch.manual_seed(0)
    acts = [F.gelu, F.gelu, lambda t: t.sin().exp().tanh(), torch.sigmoid]
    model = nn.Sequential(*map(_Activated, acts))
    work = ul.Workload(model, torch.randn(8, 16, requires_grad=True), loss=lambda o, _: o.square().mean())
    plan = ul.plan(work, policy="selective", costs="roofline")
    with plan.apply(model) as handle:  # a stale log warns, and warnings are errors
        for _ in range(3):
            model(work.batch).square().mean().backward()
        assert all(u.recomputed for u in handle.report().units)
    assert ul.verify(work, plan).ok
