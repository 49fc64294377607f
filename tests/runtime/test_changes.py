"""What a unit reads and others change between its forward and its backward."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage
from tests.runtime.steps import bits, gradients, inputs, unit
from ullage.runtime import Site

XW = ((4, 4), (4, 4))


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("what", ["0.weight", "argument 0", "2.running_mean", "closure"])
def test_what_changed_between_forward_and_backward_is_named(what: str, keep: str | None, steps_before: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    outside = torch.ones(2000, 4)  # too large to be copied
    fn = (lambda x: model(x * outside[:1]).exp().sin()) if what == "closure" else model
    call = unit(Site("unit"), keep)
    for _ in range(steps_before):
        call(fn, torch.randn(3, 4)).sum().backward()
    x = torch.randn(3, 4)
    out = call(fn, x).sum()
    with torch.no_grad():
        {"argument 0": x, "closure": outside}.get(what, model.state_dict().get(what)).add_(1)
    name = "outside" if what == "closure" else re.escape(what)
    with pytest.raises(ullage.ReplayError, match=f"^unit: {name} was changed between forward and backward"):
        out.backward()


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_what_changed_but_is_not_read_is_no_error(keep: str | None) -> None:
    """The replay stops before the unit's last op, which alone reads the second argument."""
    site = Site("unit")
    for _ in range(3):
        x, w, y = inputs((4, 4), (4, 4), (4, 4))
        out = unit(site, keep)(lambda a, b, c: (a @ b).sin() + c.detach(), x, w, y).sum()
        with torch.no_grad():
            y.add_(1)
        out.backward()
        grads = [x.grad, w.grad]
        a, b = x.detach().requires_grad_(), w.detach().requires_grad_()
        (a @ b).sin().sum().backward()
        assert all(torch.equal(g, t.grad) for g, t in zip(grads, (a, b), strict=True) if t.grad is not None)


def test_what_a_changed_tensor_goes_into_is_an_error_only_if_it_is_asked_for() -> None:
    """The argument changes; one of two outputs depends on it, and the last saved tensor of all is of that one."""

    def two(xs: list[Tensor], w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y @ w).sin(), xs[0] * 0.5 @ w

    for _ in range(3):
        (w, y), x = inputs((4, 4), (4, 4)), torch.randn(4, 4)
        first, second = ullage.checkpoint(two, [x], w, y)
        x.mul_(2)
        (grad,) = torch.autograd.grad(first.sum(), w, retain_graph=True)
        assert torch.equal(grad, torch.autograd.grad((y @ w).sin().sum(), w)[0])
        with pytest.raises(ullage.ReplayError, match=r"argument 0\[0\] was changed between forward and backward"):
            second.sum().backward()


def test_control_flow_on_a_changed_tensor_is_an_error() -> None:
    def unit_with_branch(xs: list[Tensor], y: Tensor) -> Tensor:
        return y.sin().exp() if xs[0].sum() > 0 else y.cos().exp()

    x, (y,) = torch.ones(4), inputs((4, 4))
    out = ullage.checkpoint(unit_with_branch, [x], y)
    x.neg_()
    with pytest.raises(ullage.ReplayError, match=r"argument 0\[0\] was changed .* reads a value that follows from it"):
        out.sum().backward()


@pytest.mark.parametrize("asked", [False, True])
def test_a_backward_inside_a_unit_of_what_has_changed(asked: bool) -> None:
    """Its gradient follows from what has changed; that is an error only if the unit's own backward asks for it."""
    w = torch.linspace(-1, 1, 4).requires_grad_()
    given = torch.linspace(0, 1, 4)

    def unit(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            z = t.detach().requires_grad_()
            (g,) = torch.autograd.grad(torch.tanh(z).square().sum(), z)
        return (x * w).sin() * (g if asked else 1.0) + g

    def step(call: Callable[..., Tensor]) -> Any:
        x, t = torch.linspace(1, 2, 4).requires_grad_(), given.clone()
        y = call(unit, x, t)
        t.add_(1)
        y.sum().backward()
        return bits(x.grad)

    plain = step(lambda f, *a: f(*a))
    for _ in range(2):
        if asked:
            with pytest.raises(
                ullage.ReplayError, match="argument 1 was changed between forward and backward, so the replay"
            ):
                step(ullage.checkpoint)
        else:
            assert step(ullage.checkpoint) == plain


CHANGING: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add_": lambda c, x: c.add_(1),
    "copy_": lambda c, x: c.copy_(x.detach().mean(0)),
    "set_": lambda c, x: c.set_((c * 0.5 + 1).detach()),
    "an item": lambda c, x: c[:2].mul_(0.5),
}


class Counts(nn.Module):
    """Changes its buffer in each call and multiplies by it: autograd saves the buffer itself."""

    def __init__(self, width: int, change: Callable[[Tensor, Tensor], object], saves: bool) -> None:
        super().__init__()
        self.register_buffer("c", torch.ones(width))
        self.change, self.saves = change, saves

    def forward(self, x: Tensor) -> Tensor:
        self.change(self.c, x)
        return (x * self.c).sin() if self.saves else (x + self.c).sin()


@pytest.mark.parametrize("width", [4, 5000], ids=["small", "large"])
@pytest.mark.parametrize("keep", [None, "matmul_attention"])
@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("kind", CHANGING)
def test_a_buffer_that_a_unit_changes_at_each_call(kind: str, saves: bool, keep: str | None, width: int) -> None:
    """The first call's is not what it saved any more: plain autograd raises, unless it saves what was made of it."""

    def step(call: Callable[..., Tensor], last_first: bool) -> Any:
        model = Counts(width, CHANGING[kind], saves)
        x = torch.linspace(0, 1, 2 * width).view(2, width).requires_grad_()
        outs = [call(model, x), call(model, x * 2)]
        for out in outs[::-1] if last_first else outs:
            out.sum().backward()
        return bits(x.grad), bits(model.c)

    for last_first in (False, True):
        if saves:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                step(lambda m, x: m(x), last_first)
            with pytest.raises(ullage.ReplayError, match="c was changed between forward and backward"):
                step(lambda m, x: ullage.checkpoint(m, x, keep=keep), last_first)
        else:
            plain = step(lambda m, x: m(x), last_first)
            assert step(lambda m, x: ullage.checkpoint(m, x, keep=keep), last_first) == plain


@pytest.mark.parametrize("size", [(4, 4), (80, 80)], ids=["small", "large"])
def test_a_closed_over_tensor_changed_by_others(size: tuple[int, int]) -> None:
    """A small one is put back for the replay; with a large one the replay is refused, if it holds other values."""
    for _ in range(3):
        (x,), around = inputs(size), torch.ones(size)
        out = ullage.checkpoint(lambda x, a=around: (x * a.exp()).sin(), x)
        around.mul_(2)
        if size == (80, 80):
            with pytest.raises(ullage.ReplayError, match="default 0 was changed between"):
                out.sum().backward()
            continue
        out.sum().backward()
        plain = x.detach().requires_grad_()
        (plain * torch.ones(size).exp()).sin().sum().backward()
        assert torch.equal(x.grad, plain.grad)  # type: ignore[arg-type]
        assert torch.equal(around, torch.full(size, 2.0))
        assert around._version == 1


def test_a_bound_argument_that_only_a_later_call_may_write_to() -> None:
    """A leaf that needs a gradient can't be written in place, what the first call made of it can."""

    def unit_that_writes(x: Tensor) -> Tensor:
        return F.gelu(x + 0.5 if x.is_leaf else x.add_(x))

    grads = []
    for call in (lambda fn: fn(), ullage.checkpoint):
        (x,) = inputs((4, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ullage.UllageWarning)
            out = call(functools.partial(unit_that_writes, call(functools.partial(unit_that_writes, x))))
        out.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_an_argument_of_a_nested_unit_may_change_after_it() -> None:
    """The plain step does not save it; the outer unit, which keeps what it saves, makes it again."""

    def inner(x: Tensor, a: Tensor) -> Tensor:
        return (x * a.sum()).tanh()

    def outer(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).detach().relu()
        y = call(inner, x, h).sin()
        h.mul_(0.5)
        return y

    call = lambda fn, *a: fn(*a)  # noqa: E731
    wanted = gradients(outer, inputs(*XW), call, 3)
    for keep in (None, lambda op: True):
        call = functools.partial(ullage.checkpoint, keep=keep)
        assert gradients(outer, inputs(*XW), call, 3) == wanted


def test_a_parameter_replaced_between_forward_and_backward_is_there_in_the_replay() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    (wanted,) = torch.autograd.grad(model(x).exp().sin().sum(), x)
    out = ullage.checkpoint(lambda x: model(x).exp().sin(), x)
    model.weight = other = nn.Parameter(torch.zeros(4, 4))
    out.sum().backward()
    assert torch.equal(x.grad, wanted) and model.weight is other
