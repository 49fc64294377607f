"""What surrounds a forward surrounds its replay: generators, autocast, flags, default device."""

from __future__ import annotations

import random
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import ullage
from tests.runtime.steps import Wrap, bits, gradients, inputs, ours, plain, rng, seed, selective, steps, torchs, unit
from ullage.runtime import Site
from ullage.runtime.ambient import _ambient as ambient

both = pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
XW = ((4, 4), (4, 4))


# --- generators ------------------------------------------------------------------------------------------------------


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.b(F.dropout(self.a(x), 0.5).sin()), 0.5).exp()


@pytest.mark.parametrize("wrap", [ours, selective, torchs], ids=["full", "selective", "torch"])
def test_dropout(wrap: Wrap) -> None:
    def loss(model: nn.Module, call: Wrap) -> Tensor:
        x = call(model, torch.randn(4, 8))
        return call(model, F.dropout(x, 0.5)).sum() + torch.rand(())

    assert steps(Dropouts, loss, wrap, 4) == steps(Dropouts, loss, plain, 4)


@both
def test_draws_between_forward_and_backward_stay(wrap: Wrap) -> None:
    """Backward leaves every generator where it found it, not where the forward began."""

    def run(call: Wrap) -> Any:
        seed()
        model = Dropouts()
        seen = []
        for _ in range(3):
            out = call(model, torch.randn(4, 8)).sum()
            torch.rand(3)
            random.random()
            np.random.rand()
            before = rng()
            out.backward()
            assert rng() == before
            seen.append((bits(out), [bits(p.grad) for p in model.parameters()], before))
        return seen

    assert run(wrap) == run(plain)


def _noise(x: Tensor, w: Tensor, generator: torch.Generator) -> Tensor:
    return ((x @ w) * torch.rand(4, 4, generator=generator)).sin().exp() @ w


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return _noise(x, w, self.generator)


@both
@pytest.mark.parametrize("where", ["argument", "keyword", "attribute", "closure", "list"])
def test_a_generator_of_ones_own(wrap: Wrap, where: str) -> None:
    def run(call: Wrap) -> Any:
        generator = torch.Generator().manual_seed(7)
        module = Noisy()
        if where == "attribute":
            generator = module.generator
        bag = [generator]
        fn = {
            "argument": lambda x, w: call(_noise, x, w, generator),
            "keyword": lambda x, w: call(_noise, x, w, generator=generator),
            "attribute": lambda x, w: call(module, x, w),
            "closure": lambda x, w: call(lambda x, w: _noise(x, w, generator), x, w),
            "list": lambda x, w: call(lambda x, w, bag: _noise(x, w, bag[0]), x, w, bag),
        }[where]
        return gradients(fn, inputs(*XW), plain, 4), bits(generator.get_state())

    assert run(wrap) == run(plain)


def _host(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w) * random.random() + float(np.random.rand())).sin().exp() @ w


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_pythons_and_numpys_generators(keep: str | None) -> None:
    """The first call shows that it draws, and is covered itself; later ones are covered without asking."""
    site = Site("unit")

    def run(call: Wrap) -> Any:
        seed()
        return gradients(_host, inputs(*XW), call, 4), rng()

    assert run(unit(site, keep)) == run(plain)
    assert all(facts.host_rng for facts in site.facts.values())
    assert run(torchs)[0] != run(plain)[0]  # torch's does not cover them


def test_a_draw_that_comes_later_needs_to_be_asked_for() -> None:
    """A unit that didn't draw at its first call, and does now: covered with `preserve_host_rng`."""
    draws = [False]

    def f(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w) * (random.random() if draws[0] else 1.0)).sin().exp() @ w

    def run(call: Wrap) -> Any:
        seed()
        draws[0] = False
        first = gradients(f, inputs(*XW), call)
        draws[0] = True
        return first + gradients(f, inputs(*XW), call, 3), rng()

    assert run(lambda *a: ullage.checkpoint(*a, preserve_host_rng=True)) == run(plain)


# --- autocast --------------------------------------------------------------------------------------------------------


def _inner_off(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    with torch.autocast("cpu", enabled=False):
        h = h.float().exp() @ w
    return (h @ w).sin() @ w


@pytest.mark.parametrize("f", [lambda x, w: (x @ w).sin().exp() @ w, _inner_off], ids=["all", "nested off"])
@pytest.mark.parametrize("wrap", [ours, selective, torchs], ids=["full", "selective", "torch"])
def test_autocast(f: Any, wrap: Wrap) -> None:
    """Backward runs outside autocast; the replay inside it."""

    def step(x: Tensor, w: Tensor, call: Wrap) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = call(f, x, w)
        assert out.dtype == torch.bfloat16
        return out

    def run(call: Wrap) -> Any:
        return gradients(lambda x, w: step(x, w, call), inputs(*XW), plain, 3)

    assert run(wrap) == run(plain)
    assert not torch.is_autocast_enabled("cpu")


@both
def test_backward_under_an_autocast_of_its_own(wrap: Wrap) -> None:
    """The other way round: forward without, backward inside; and the dtype changed in between."""

    def run(call: Wrap, around: Any) -> Any:
        seen = []
        for _ in range(3):
            x, w = inputs(*XW)
            with around:
                out = call(lambda x, w: (x @ w).sin().exp() @ w, x, w)
            with torch.autocast("cpu", torch.float16):
                out.float().sum().backward()
                assert torch.get_autocast_dtype("cpu") == torch.float16
                assert torch.is_autocast_enabled("cpu")
            seen.append((bits(out), bits(x.grad), bits(w.grad)))
        return seen

    for around in (torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        assert run(wrap, around) == run(plain, around)


@both
def test_autocast_models_with_shared_weights(wrap: Wrap) -> None:
    """The cache of casts: a weight cast outside the unit is in the cache in forward, and not in the replay."""

    def make() -> nn.Module:
        return nn.Linear(8, 8)

    def loss(model: nn.Module, call: Wrap) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = model(torch.randn(4, 8))
            x = call(lambda t: model(model(t).sin()).exp(), x)
            return call(lambda t: model(t).sin(), x).float().sum()

    assert steps(make, loss, wrap) == steps(make, loss, plain)


# --- grad mode, flags, device ----------------------------------------------------------------------------------------


@both
def test_grad_mode(wrap: Wrap) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            mean = (x @ w).exp().mean()
        with torch.set_grad_enabled(True):
            return ((x @ w) - mean).sin().exp() @ w

    assert gradients(f, inputs(*XW), wrap, 3) == gradients(f, inputs(*XW), plain, 3)
    x, w = inputs(*XW)
    with torch.no_grad():
        out = wrap(f, x, w)
    assert bits(out) == bits(f(x, w))
    total = wrap(f, x, w).sum()
    with torch.no_grad():  # backward in no_grad is allowed
        total.backward()
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert bits(wrap(f, x, w)) == bits(f(x, w))


def _flags_seen(x: Tensor, w: Tensor) -> Tensor:
    """Its result depends on every flag."""
    factor = 1.0
    factor += torch.are_deterministic_algorithms_enabled()
    factor += 2 * torch.is_deterministic_algorithms_warn_only_enabled()
    factor += 4 * torch.backends.cuda.math_sdp_enabled()
    factor += 8 * (torch.get_default_device().type == "meta")
    factor += 16 * (torch.get_default_dtype() == torch.float64)
    return ((x @ w) * factor).sin().exp() @ w


@both
@pytest.mark.parametrize("which", ["deterministic", "dtype", "sdpa", "device"])
def test_flags(wrap: Wrap, which: str) -> None:
    def context() -> Any:
        return {"sdpa": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION), "device": lambda: torch.device("meta")}.get(
            which, torch.enable_grad
        )()

    def run(call: Wrap) -> Any:
        seen = []
        for _ in range(3):
            x, w = inputs(*XW)
            with context():
                if which == "deterministic":
                    torch.use_deterministic_algorithms(True, warn_only=True)
                if which == "dtype":
                    torch.set_default_dtype(torch.float64)
                try:
                    out = call(_flags_seen, x, w)
                finally:
                    torch.use_deterministic_algorithms(False)
                    torch.set_default_dtype(torch.float32)
            out.sum().backward()
            assert not torch.are_deterministic_algorithms_enabled()
            assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_device().type == "cpu"
            seen.append((bits(out), bits(x.grad), bits(w.grad)))
        return seen

    assert run(wrap) == run(plain)
    assert run(wrap)[0] != gradients(_flags_seen, inputs(*XW), plain)[0]


@both
def test_attention_kernels(wrap: Wrap) -> None:
    def f(q: Tensor, w: Tensor) -> Tensor:
        h = (q @ w).view(1, 2, 8, 16)
        return F.scaled_dot_product_attention(h, h.sin(), h.cos(), is_causal=True).exp() @ w

    shapes = ((1, 2, 8, 16), (16, 16))
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):

        def step(q: Tensor, w: Tensor, call: Wrap) -> Tensor:
            with sdpa_kernel(kernel):  # noqa: B023
                return call(f, q, w)

        a = gradients(lambda q, w: step(q, w, wrap), inputs(*shapes), plain, 3)
        assert a == gradients(lambda q, w: step(q, w, plain), inputs(*shapes), plain, 3)


@both
def test_default_device(wrap: Wrap) -> None:
    """Tensors made in the unit are made where they were made in forward."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w) + torch.ones(4)).sin().exp() @ w

    def run(call: Wrap) -> Any:
        x, w = inputs(*XW)
        with torch.device("cpu"):
            out = call(f, x, w)
        with torch.device("meta"):
            out.sum().backward(torch.ones((), device="cpu"))
        return bits(x.grad), bits(w.grad)

    for _ in range(3):
        assert run(wrap) == run(plain)


def test_an_input_cast_by_several_ops_under_autocast_is_cast_as_often_in_the_replay() -> None:
    """Autocast remembers the casts of leaves: were the replay's input one, its ops would not be those of the log."""
    torch.manual_seed(0)
    first, a, b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    site = Site("unit")
    call = unit(site, "matmul_attention")

    def grads(call: Wrap) -> list[bytes]:
        seen = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                x = first(torch.ones(3, 4)).float()
                out = call(lambda x: torch.nn.functional.gelu(a(x)) * b(x).sin(), x)
            for m in (first, a, b):
                m.zero_grad()
            out.float().sum().backward()
            seen += [p.grad.numpy().tobytes() for m in (first, a, b) for p in m.parameters() if p.grad is not None]
        return seen

    assert grads(call) == grads(plain)
    assert site.skipped > 0 and site.stale == 0


def test_generators_of_devices_in_nested_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's `get_device_states`, and of keyword arguments too."""
    generators = [torch.Generator() for _ in range(4)]
    module = types.SimpleNamespace(_initialized=True, default_generators=generators, current_device=lambda: 3)
    monkeypatch.setattr(ambient, "_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    with FakeTensorMode():
        on = [torch.empty(1, device=f"cuda:{n}") for n in range(3)]
    for args, wanted in (
        ((on[1],), [1]),
        (({"a": [on[2]], "b": (torch.ones(1), on[0])},), [0, 2]),
        (({"a": 1}, torch.ones(1)), [3]),  # none of that kind: the current one
    ):
        found = [get for get, _ in ambient.sources_for(args)[1:]]
        assert found == [generators[n].get_state for n in wanted]
