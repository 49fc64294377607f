"""An error at any op of forward, replay or backward leaves nothing behind, and the next step is exact."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ullage
from tests.runtime.steps import Wrap, assert_clean, bits, frames, inputs, ours, plain, rng, seed, selective, tensors


class Fault(Exception):
    """What is injected."""


class Interrupt(BaseException):
    """The same, as a KeyboardInterrupt would be."""


class RaiseAt(TorchDispatchMode):
    """Counts ops, and raises instead of one of them."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.at, self.error, self.n = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        if self.n == self.at:
            raise self.error(f"instead of {func}")
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """A buffer, a list, a counter, dropout, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.seen: list[int] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        h = F.dropout(self.a(x).sin(), 0.5)
        return self.norm(self.b(h).exp()).cos() * len(self.seen)


class Model(nn.Module):
    def __init__(self, outer: Wrap, inner: Wrap) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.outer, self.inner = outer, inner

    def _nested(self, x: Tensor) -> Tensor:
        return self.inner(self.blocks[1], x.sin()).exp().sin()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self._nested, self.outer(self.blocks[0], x)).sum()


def _state(model: Model) -> Any:
    attributes = [(b.calls, list(b.seen)) for b in model.blocks]
    return {n: bits(b) for n, b in model.named_buffers()}, attributes


def _step(model: Model) -> Any:
    model.zero_grad()
    x = torch.ones(3, 4).requires_grad_()
    loss = model(x * torch.rand(3, 4))
    loss.backward()
    return bits(loss), [bits(p.grad) for p in model.parameters()], bits(x.grad), _state(model), rng()


def _as_plain(model: Model) -> Model:
    twin = copy.deepcopy(model)
    twin.outer = twin.inner = plain
    return twin


def _assert_whole(model: Model) -> None:
    """The next steps are the plain ones, whatever the state is now."""
    twin = _as_plain(model)
    for n in range(1):
        seed(n)
        truth = _step(twin)
        seed(n)
        assert _step(model) == truth


def _fault(model: Model, at: int, error: type[BaseException]) -> bool:
    """One step with a fault at its `at`-th op; False if it has fewer ops."""
    seed(9)
    x = torch.ones(3, 4).requires_grad_()
    fault = RaiseAt(at, error)
    after_forward = None
    model.zero_grad()
    twin = _as_plain(model)
    twin(torch.ones(3, 4))  # what one forward makes of the state
    seed(9)
    try:
        with fault:
            loss = model(x)
            after_forward = _state(model), rng()
            loss.backward()
    except error:
        pass
    except ullage.ReplayError:
        raise AssertionError("a fault must not turn into another error") from None
    if after_forward is not None:
        assert (_state(model), rng()) == after_forward  # backward changes neither state nor generators
        assert after_forward[0] == _state(twin)
    assert_clean()
    return fault.n >= at


CASES: dict[str, tuple[Wrap, Wrap]] = {
    "full": (ours, plain),
    "selective": (selective, plain),
    "nested full": (ours, ours),
    "nested mixed": (ours, selective),
    "nested selective": (selective, selective),
}


def _faults(case: str, first: bool, error: type[BaseException], stride: int) -> None:
    at, more, count = stride, True, 0
    while more:
        with warnings.catch_warnings():
            # a fault in a selective replay is taken for a stale log, and full replay does it
            warnings.filterwarnings("ignore", "(?s).*a stale op log", ullage.UllageWarning)
            ullage.runtime.forward._checkpoint._sites.clear()
            seed(1)
            model = Model(*CASES[case])
            for _ in range(0 if first else 2):
                _step(model)
            more = _fault(model, at, error)
            _assert_whole(model)
        del model
        at += stride
        if at // stride == 4:
            count = tensors()
    assert at > 100
    assert frames() == 0
    assert tensors() <= count


@pytest.mark.parametrize("error", [Fault, Interrupt])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("case", CASES)
def test_a_fault_at_some_op(case: str, first: bool, error: type[BaseException]) -> None:
    _faults(case, first, error, (13 if error is Fault else 41) + 2 * list(CASES).index(case))


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("case", CASES)
def test_a_fault_at_every_op(case: str, first: bool) -> None:
    """Alone shows that no op is without its cleanup: the faster test tries every 13th to 49th op, and what is no `Exception`."""
    _faults(case, first, Fault, 1)


@pytest.mark.parametrize(
    "case",
    [
        "full",
        "nested selective",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("selective", "nested full", "nested mixed")),
    ],
)
def test_a_graph_dropped_without_backward(case: str) -> None:
    seed(1)
    model = Model(*CASES[case])
    before = None
    for n in range(4):
        model(torch.ones(3, 4).requires_grad_())  # dropped at once
        assert frames() == 0
        assert_clean()
        if n >= 2:
            count = tensors()
            assert before is None or count == before
            before = count
    _assert_whole(model)


@pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
def test_a_graph_kept_and_dropped_after_half_a_backward(wrap: Wrap) -> None:
    """What one backward rebuilt and did not use is gone when it ends."""
    rebuilt: list[Any] = []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(y := x * 2)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            rebuilt.append(weakref.ref(y.untyped_storage()))
            return grad * 2

    def f(x: Tensor, w: Tensor) -> Any:
        return Note.apply(x).sin(), (x @ w).sin().exp()

    for _ in range(3):
        x, w = inputs((4, 4), (4, 4))
        a, b = wrap(f, x, w)
        a.sum().backward(retain_graph=True)
        gc.collect()
        assert rebuilt[-1]() is None
        b.sum().backward()
        del a, b
        assert frames() == 0


@pytest.mark.parametrize("how", ["inside", "backward hook"])
@pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
def test_an_error_of_the_units_own(wrap: Wrap, how: str) -> None:
    """It comes out as it is; the next step is exact."""
    fail = {"now": False}

    def f(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).sin()
        if how == "inside" and fail["now"]:
            raise KeyError("the unit's own")
        return h.exp().cos()

    def hook(grad: Tensor) -> Tensor:
        if how == "backward hook" and fail["now"]:
            raise KeyError("the unit's own")
        return grad

    def step(call: Wrap, failing: str) -> Any:
        x, w = inputs((4, 4), (4, 4))
        y = x * 1
        y.register_hook(hook)
        fail["now"] = failing == "forward"
        out = call(f, y, w)
        fail["now"] = failing == "backward"
        try:
            out.sum().backward()
        finally:
            fail["now"] = False
        return bits(x.grad), bits(w.grad)

    truth = step(plain, "")
    for failing in ("", "forward", "", "backward", "", "backward", ""):
        if failing and (how, failing) != ("backward hook", "forward"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*a stale op log", ullage.UllageWarning)
                with pytest.raises(KeyError, match="the unit's own"):
                    step(wrap, failing)
            assert_clean()
            assert frames() == 0
        else:
            assert step(wrap, failing) == truth


def test_torch_outside_an_error_inside() -> None:
    """ullage's checkpoint inside torch's, with an error in the replay of either."""
    fail = {"at": 0, "n": 0}
    checks: list[Callable[..., Any]] = [ours, selective]

    def inner(x: Tensor, w: Tensor) -> Tensor:
        fail["n"] += 1
        if fail["n"] == fail["at"]:
            raise Fault
        return (x @ w).sin().exp().cos()

    for call in checks:
        truth = None
        for at in (0, 1, 2, 3, 4, 0):
            fail.update(at=at, n=0)
            x, w = inputs((4, 4), (4, 4))
            try:
                outer = lambda x, w: call(lambda x, w: inner(x, w), x.sin(), w).exp().sin()  # noqa: B023, E731
                torch_checkpoint(outer, x, w, use_reentrant=False).sum().backward()
            except Fault:
                assert at
            assert_clean()
            if at == 0:
                assert truth is None or truth == (bits(x.grad), bits(w.grad))
                truth = bits(x.grad), bits(w.grad)
