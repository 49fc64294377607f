"""Checkpoints in checkpoints, and derivatives taken inside them."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint as tc
from torch import Tensor

from tests.runtime.torch_cases._case import Checkpoint, case, leaf, same

Unary = Callable[[Tensor], Tensor]


def _derivative(f: Unary) -> Unary:
    def derived(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]

    return derived


def _wrapped(checkpoint: Checkpoint) -> Callable[[Unary], Unary]:
    return lambda f: lambda x: checkpoint(f, x)


def _chain(x: Tensor) -> Tensor:
    return x.sin().exp().sin()


def _with_inner_grads(x: Tensor) -> Tensor:
    a, b = x.sin().exp().sin(), x.sin().exp().sin()
    torch.autograd.grad(a.sum(), x)
    torch.autograd.grad(b.sum(), x)
    return x.sin()


def _dies(f: Unary) -> None:
    """The graph of a call goes with its output, without a collector."""

    class Mark:
        pass

    def call() -> list[Any]:
        out = f(leaf())
        seen, todo, marks = set(), collections.deque([out.grad_fn]), []
        while todo:
            node = todo.popleft()
            if node is None or node in seen:
                continue
            seen.add(node)
            mark = node.metadata["mark"] = Mark()
            marks.append(weakref.ref(mark))
            todo.extend(n for n, _ in node.next_functions)
        return marks

    assert not [m for m in call() if m() is not None], "nodes of a graph outlive it"


def _orders(checkpoint: Checkpoint, f: Unary, early_stop: bool) -> None:
    c, d = _wrapped(checkpoint), _derivative
    ways: list[tuple[Unary, list[Unary]]] = [
        (f, [c(f), c(c(f))]),
        (d(f), [d(c(f)), d(c(c(f)))]),
        (d(d(f)), [d(c(d(f))), c(d(d(c(f)))), d(c(d(c(f))))]),
        (d(d(d(f))), [d(c(d(d(c(f))))), d(c(d(c(d(c(f))))))]),
    ]
    with tc.set_checkpoint_early_stop(early_stop):
        x = leaf()
        for plain, wrapped in ways:
            for way in wrapped:
                same(way(x), plain(x))
                _dies(way)


NESTED = "TestNestedCheckpoint.test_nested_checkpoint"


@case(NESTED)
def derivatives_of_nested_units(checkpoint: Checkpoint) -> None:
    """Up to third derivatives, checkpointed at any of the levels."""
    _orders(checkpoint, _chain, True)


@case(NESTED)
def derivatives_of_nested_units_run_to_their_end(checkpoint: Checkpoint) -> None:
    """The same without an early stop."""
    _orders(checkpoint, _chain, False)


@case(NESTED)
def derivatives_of_units_that_differentiate(checkpoint: Checkpoint) -> None:
    """The unit calls autograd itself."""
    _orders(checkpoint, _with_inner_grads, True)


@case(NESTED)
def derivatives_of_units_that_differentiate_run_to_their_end(checkpoint: Checkpoint) -> None:
    """The same without an early stop."""
    _orders(checkpoint, _with_inner_grads, False)


def _two_children(checkpoint: Checkpoint, early_stop: bool) -> None:
    c, d = _wrapped(checkpoint), _derivative
    g: Unary = lambda x: x.cos().sin().exp()  # noqa: E731
    plain: Unary = lambda x: g(_chain(x))  # noqa: E731
    both: Unary = lambda x: c(g)(c(_chain)(x))  # noqa: E731
    x = leaf(3, 3)
    with tc.set_checkpoint_early_stop(early_stop):
        for way in (d(d(c(both))), d(c(d(c(both))))):
            same(way(x), d(d(plain))(x))
            _dies(way)


@case("TestNestedCheckpoint.test_nested_checkpoint_two_children")
def two_units_in_one(checkpoint: Checkpoint) -> None:
    """A unit of two units, differentiated twice."""
    _two_children(checkpoint, True)


@case("TestNestedCheckpoint.test_nested_checkpoint_two_children")
def two_units_in_one_run_to_their_end(checkpoint: Checkpoint) -> None:
    """The same without an early stop."""
    _two_children(checkpoint, False)


@case("TestNestedCheckpoint.test_nested_checkpoint_same_graph")
def the_graph_of_forward_is_the_one_that_goes_backward(checkpoint: Checkpoint) -> None:
    """A hook on a node of it is called once."""
    for early_stop in (True, False):
        calls: list[int] = []
        with tc.set_checkpoint_early_stop(early_stop):
            out = checkpoint(_chain, leaf())
        out.grad_fn.next_functions[0][0].register_hook(lambda *_, calls=calls: calls.append(1))
        out.backward()
        assert calls == [1]


@case("TestNestedCheckpoint.test_nested_checkpoint_reentrant_backwards")
def a_hook_goes_backward_through_the_same_unit(checkpoint: Checkpoint) -> None:
    """A backward within the backward."""

    def run(call: Checkpoint) -> Tensor:
        a = torch.ones((), requires_grad=True)

        def f(a: Tensor) -> tuple[Tensor, Tensor]:
            x = a.sin().cos()
            return x, x.sin()

        x, out = call(f, a)
        out.grad_fn.register_hook(lambda *_: x.backward(retain_graph=True))
        out.backward(retain_graph=True)
        assert a.grad is not None
        return a.grad

    for early_stop in (True, False):
        with tc.set_checkpoint_early_stop(early_stop):
            same(run(checkpoint), run(lambda f, *a: f(*a)))


@case("TestNestedCheckpoint.test_nested_checkpoint_non_tensor_inputs_and_outputs")
def arguments_and_outputs_that_are_no_tensors(checkpoint: Checkpoint) -> None:
    """Numbers, functions and texts."""

    def f(k: int, a: Tensor, b: Tensor, g: Unary) -> Any:
        return g(k * a * b.exp()), 1, "text"

    a, b = leaf(), leaf()
    for early_stop in (True, False):
        with tc.set_checkpoint_early_stop(early_stop):
            out = checkpoint(f, 3, a, b, torch.sin)
        assert out[1:] == (1, "text")
        same(torch.autograd.grad(out[0], (a, b)), torch.autograd.grad(f(3, a, b, torch.sin)[0], (a, b)))


@case("TestNestedCheckpoint.test_nested_checkpoint_kwargs")
def keyword_arguments(checkpoint: Checkpoint) -> None:
    """A tensor given by keyword has its gradient."""

    def f(a: Tensor, other: Tensor | None = None) -> Tensor:
        out = a.sin().exp()
        return (out if other is None else out * other).sin().exp()

    a, b = leaf(), leaf()
    for early_stop in (True, False):
        with tc.set_checkpoint_early_stop(early_stop):
            out = checkpoint(f, a, other=b)
        same(torch.autograd.grad(out, (a, b)), torch.autograd.grad(f(a, other=b), (a, b)))
