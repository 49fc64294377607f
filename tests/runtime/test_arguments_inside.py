"""Arguments of a unit in a unit: the plain step does not save them, so they may be written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ullage as ul

W = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))


def grads(block: Callable[[Any], Callable[[Tensor, Tensor], Tensor]], call: Any, twice: bool = False) -> list[Tensor]:
    """Of two steps, with the plain call or with units."""
    found: list[Tensor] = []
    for k in range(2):
        g = torch.Generator().manual_seed(k)
        x = torch.randn(4, 8, generator=g, requires_grad=True)
        r = torch.randn(4, 8, generator=g)
        loss = call(block(call), x * 1.0, r).square().sum()
        if twice:
            found += torch.autograd.grad(loss, x, retain_graph=True)
        found += torch.autograd.grad(loss, x)
    return found


def plain(fn: Any, *args: Any) -> Any:
    return fn(*args)


def unit(fn: Any, *args: Any) -> Any:
    return ul.checkpoint(fn, *args)


@pytest.mark.parametrize("twice", [False, True])
def test_a_unit_writes_to_what_it_gave_a_unit_in_it(twice: bool) -> None:
    def block(call: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def outer(x: Tensor, r: Tensor) -> Tensor:
            h = x.exp()  # saved by exp's formula, so it is not what is written to
            given = h + 1
            y = call(lambda t: t.tanh() * 2, given)
            given.mul_(3)
            return y + given

        return outer

    assert all(torch.equal(a, b) for a, b in zip(grads(block, plain, twice), grads(block, unit, twice), strict=True))


@pytest.mark.parametrize("view", [lambda x: x[:, :2], lambda x: x[:, ::2], lambda x: x[1:, 1:].t()])
def test_a_copy_of_such_an_argument_lies_in_memory_as_it_does(view: Callable[[Tensor], Tensor]) -> None:
    """The outer unit's replay compares strides: a contiguous copy of a view with gaps would be refused."""

    def block(call: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def outer(x: Tensor, r: Tensor) -> Tensor:
            given = view(x.exp() + 1)
            y = call(lambda t: (t + 1).sin() * 2, given)
            given.mul_(3)
            return (y + given).sin()  # so that the replay doesn't stop before the write

        return outer

    assert all(torch.equal(a, b) for a, b in zip(grads(block, plain), grads(block, unit), strict=True))


def test_of_two_arguments_each_is_as_it_was_at_its_call() -> None:
    def block(call: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def outer(x: Tensor, r: Tensor) -> Tensor:
            given = x + 1
            y = call(lambda t: t.sigmoid() @ W, given)
            given.mul_(0.5)
            z = call(lambda t: (t @ W).tanh(), given)
            given.add_(r)
            return y + z + given

        return outer

    assert all(torch.equal(a, b) for a, b in zip(grads(block, plain), grads(block, unit), strict=True))


def test_what_the_plain_step_saves_and_then_writes_to_is_refused_as_by_autograd() -> None:
    def outer(x: Tensor, r: Tensor) -> Tensor:
        given = x + 1
        y = given.sin()
        given.mul_(3)
        return (y + given).exp()  # the replay goes on past the write

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(lambda call: outer, plain)
    with pytest.raises(ul.ReplayError, match="the plain step would fail too"):
        grads(lambda call: outer, unit)


def test_an_argument_that_changed_and_that_backward_does_not_need() -> None:
    """The unit in the unit is given both; only the other one goes into what it saves."""

    def step(call: Any) -> Tensor:
        x = torch.linspace(-1, 1, 8).requires_grad_()
        r = torch.ones(8)

        def outer(x: Tensor, r: Tensor) -> Tensor:
            return call(lambda t, s: (t.tanh() + s).sum() + t.exp().sum(), x, r)  # type: ignore[no-any-return]

        loss = call(outer, x, r)
        r.add_(1)
        return torch.autograd.grad(loss, x)[0]

    assert torch.equal(step(plain), step(unit))


def test_an_argument_that_changed_and_that_backward_needs_is_named() -> None:
    x = torch.linspace(-1, 1, 8).requires_grad_()
    r = torch.ones(8)

    def outer(x: Tensor, r: Tensor) -> Tensor:
        return unit(lambda t, s: (t * s).tanh().sum(), x, r)  # type: ignore[no-any-return]

    loss = unit(outer, x, r)
    r.add_(1)
    with pytest.raises(ul.ReplayError, match="argument 1 was changed between forward and backward"):
        loss.backward()


def test_an_argument_that_the_unit_in_it_saves_is_refused_as_by_autograd() -> None:
    def block(call: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def outer(x: Tensor, r: Tensor) -> Tensor:
            given = x + 1
            y = call(lambda t: t.sin(), given)  # the plain step saves what is written to
            given.mul_(3)
            return (y + given).exp()

        return outer

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(block, plain)
    with pytest.raises(ul.ReplayError, match="an argument was changed between forward and backward"):
        grads(block, unit)


def _written_while_another_has_changed(call: Any, needed: bool) -> Tensor:
    x = torch.linspace(-1, 1, 8).requires_grad_()
    r = torch.ones(8)

    def outer(x: Tensor, r: Tensor) -> Tensor:
        given = x + 1
        y = call(lambda t, s: t.tanh() * 2 + (s * t if needed else s), given, r)
        given.mul_(3)
        return y.sum() + given.exp().sum()

    loss = call(outer, x, r)
    r.add_(1)
    return torch.autograd.grad(loss, x)[0]


def test_an_argument_is_written_to_while_another_that_has_changed_is_not_needed() -> None:
    assert torch.equal(
        _written_while_another_has_changed(plain, False), _written_while_another_has_changed(unit, False)
    )


def test_an_argument_is_written_to_while_another_that_has_changed_is_needed() -> None:
    with pytest.raises(ul.ReplayError, match="argument 1 was changed between forward and backward|modified by"):
        _written_while_another_has_changed(unit, True)
