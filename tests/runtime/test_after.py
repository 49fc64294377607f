"""A replay leaves things as it found them, although it stops half-way; and it runs with the settings of its forward."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.steps import Wrap, gradients, inputs, ours, plain, selective, steps
from ullage.runtime import Apart
from ullage.runtime.ambient._settings import put_settings, read_settings

both = pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
XW = ((4, 4), (4, 4))


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    before = read_settings()
    yield
    put_settings(before, read_settings())


class HalfWay(nn.Module):
    """Sets something, saves its last tensor, and puts it back without `finally`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear, self.drop = kind, nn.Linear(8, 8), nn.Dropout(0.5)
        self.inner = nn.Module()
        self.inner.level = 0

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(self.linear(x).tanh())  # type: ignore[no-any-return]

    def added(self, h: Tensor) -> Tensor:
        self.inner.cache = h * 2
        h = (self.inner.cache + h).sin()
        del self.inner.cache
        return h

    def deleted(self, h: Tensor) -> Tensor:
        level = self.inner.__dict__.pop("level")
        h = h.sin()
        self.inner.level = level
        return h

    def counted(self, h: Tensor) -> Tensor:
        self.inner.level += 1
        h = (h * self.inner.level).exp()
        self.inner.level -= 1
        return h

    def evaluated(self, h: Tensor) -> Tensor:
        h = self.drop(h)
        self.drop.eval()
        h = self.drop(h).exp()
        self.drop.train()
        return h

    def dtype(self, h: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        h = h.exp()
        torch.set_default_dtype(torch.float32)
        return h

    def deterministic(self, h: Tensor) -> Tensor:
        torch.use_deterministic_algorithms(True, warn_only=True)
        h = h.exp()
        torch.use_deterministic_algorithms(False)
        return h

    def attention(self, h: Tensor) -> Tensor:
        torch.backends.cuda.enable_math_sdp(False)
        h = h.exp()
        torch.backends.cuda.enable_math_sdp(True)
        return h

    def mkldnn(self, h: Tensor) -> Tensor:
        torch._C._set_mkldnn_enabled(False)
        h = h.exp()
        torch._C._set_mkldnn_enabled(True)
        return h

    def no_grad(self, h: Tensor) -> Tensor:
        h = h.exp()
        torch.set_grad_enabled(False)
        factor = h.cos()
        torch.set_grad_enabled(True)
        return (h * factor).exp()


class Seen(Apart):
    """What forwards and replays saw, where no replay puts it back."""

    def __init__(self) -> None:
        self.items: list[Any] = []


SEEN = Seen()


KINDS = ["added", "deleted", "counted", "evaluated", "dtype", "deterministic", "attention", "mkldnn", "no_grad"]


def _around(model: nn.Module) -> Any:
    fields = [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()]
    return (
        [(list(f), [v for v in f.values() if isinstance(v, bool | int | str)]) for f in fields],
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.is_grad_enabled(),
        read_settings(),
    )


@both
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_forward_puts_back_itself(kind: str, wrap: Wrap) -> None:
    seen = []

    def loss(model: nn.Module, call: Wrap) -> Tensor:
        seen.append(_around(model))
        out = call(model, torch.randn(4, 8))
        out.sum().backward()
        seen.append(_around(model))
        return call(model, torch.randn(4, 8)).sum()

    found = steps(lambda: HalfWay(kind), loss, wrap)
    ours_seen = seen.copy()
    seen.clear()
    assert found == steps(lambda: HalfWay(kind), loss, plain)
    assert ours_seen == seen
    assert all(s == seen[0] for s in seen)


@both
def test_settings_of_the_forward_are_those_of_its_replay(wrap: Wrap) -> None:
    """Kernels of oneDNN and torch's own round differently."""

    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 5), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            SEEN.items.append(read_settings())
            return self.b(self.a(x).sigmoid()).sigmoid()  # type: ignore[no-any-return]

    SEEN.items = []

    def loss(model: nn.Module, call: Wrap) -> Tensor:
        torch._C._set_mkldnn_enabled(False)
        torch.set_float32_matmul_precision("high")
        x = call(model, torch.randn(2, 3, 16, 16)).square().mean()
        torch.set_float32_matmul_precision("highest")
        torch._C._set_mkldnn_enabled(True)
        return x

    model = Convolutions()
    torch.set_float32_matmul_precision("highest")  # by itself nothing is set, which rounds alike and reads otherwise
    before = read_settings()
    loss(model, wrap).backward()
    assert len(SEEN.items) == 2
    assert SEEN.items[0] == SEEN.items[1] != before == read_settings()
    assert steps(Convolutions, loss, wrap) == steps(Convolutions, loss, plain)


def test_flushing_of_denormals_and_threads() -> None:
    SEEN.items = []

    def f(x: Tensor, w: Tensor) -> Tensor:
        SEEN.items.append((torch.get_num_threads(), (torch.tensor(2.0**-1022, dtype=torch.float64) / 2).item()))
        return (x @ w).sin().exp()

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU can't flush denormals")
    x, w = inputs(*XW)
    out = ours(f, x, w).sum()
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
    out.backward()
    assert SEEN.items == [(threads + 1, 0.0), (threads + 1, 0.0)]
    assert (torch.get_num_threads(), 2.0**-1022 * 0.5 > 0) == (threads, True)


_scale: contextvars.ContextVar[float] = contextvars.ContextVar("scale", default=1.0)


def _scaled(x: Tensor, w: Tensor) -> Tensor:
    h = ((x @ w) * _scale.get()).sin()
    _scale.set(_scale.get() + 1)
    return (h * _scale.get()).exp() @ w


@both
def test_context_variables(wrap: Wrap) -> None:
    """A replay sees those of its forward; what it sets itself is gone after it."""

    def run(call: Wrap) -> Any:
        def step(x: Tensor, w: Tensor) -> Tensor:
            token = _scale.set(3.0)
            out = call(_scaled, x, w)
            seen.append(_scale.get())
            _scale.reset(token)
            return out  # type: ignore[no-any-return]

        seen: list[float] = []
        found = contextvars.Context().run(gradients, step, inputs(*XW), plain, 3)
        return found, seen

    assert run(wrap) == run(plain)
