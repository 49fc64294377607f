"""The programs that broke a prototype of selective replay, each by name; the plain step is the truth."""

from __future__ import annotations

import ctypes
import random
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage
from tests.runtime.steps import (
    aten,
    bits,
    frames,
    gradients,
    inputs,
    ops_in,
    ours,
    plain,
    seed,
    selective,
    steps,
    torchs,
    unit,
)
from ullage.runtime import Apart, Shared, Site

X = ((4, 4), (4, 4), (4, 4))


def test_early_stop_skips_no_check() -> None:
    """Two units, one log, `u * v` against `v * u`: what is saved has the same shapes in another order."""
    swapped = False

    def f(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        u, v = x @ a, x @ b
        return torch.sin(v * u if swapped else u * v).cos()

    shared = Shared()
    first, second = Site("first", shared), Site("second", shared)
    assert gradients(f, inputs(*X), unit(first), 2) == gradients(f, inputs(*X), plain, 2)
    assert (first.skipped, first.stale) == (4, 0)  # two matmuls, twice
    swapped = True
    with pytest.warns(
        ullage.UllageWarning, match=r"second: a stale op log \(saved tensor \d at .*test_breaking.py:\d+ is not the one"
    ):
        assert gradients(f, inputs(*X), unit(second)) == gradients(f, inputs(*X), plain)
    assert (second.skipped, second.stale, second.replays) == (0, 1, 2)
    assert gradients(f, inputs(*X), unit(second), 2) == gradients(f, inputs(*X), plain, 2)  # a new log serves
    assert (second.skipped, second.stale) == (4, 1)


def test_in_place_on_a_kept_output() -> None:
    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = x @ w
        h.add_(b)
        return torch.sin(h) @ w

    site = Site("unit")
    assert gradients(f, inputs(*X), unit(site), 3) == gradients(f, inputs(*X), plain, 3)
    assert site.stale == 0


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_in_place_on_a_kept_output_after_the_unit(keep: str | None) -> None:
    """Outside the unit its saved output is written to: the plain step raises, so does every kind of replay."""

    def step(wrap: Any) -> None:
        x, w = inputs((4, 4), (4, 4))
        h = wrap(lambda x: torch.exp(x @ w), x)
        h.mul_(2)
        h.sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(plain)
    site = Site("unit")
    if keep is None:  # what is dropped is rebuilt unharmed, as with torch's checkpoint: the gradient of what was saved
        step(unit(site, keep))
        step(torchs)
    else:
        with pytest.raises(
            ullage.ReplayError, match=r"unit: saved tensor 2 of shape \(4, 4\) was modified by an inplace"
        ):
            step(unit(site, keep))

    def kept(wrap: Any) -> None:
        x, w = inputs((4, 4), (4, 4))
        h = wrap(lambda x: (lambda y: (y, torch.sin(y)))(x @ w), x)
        h[0].mul_(2)
        h[1].sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept(plain)
    if keep is not None:
        with pytest.raises(
            ullage.ReplayError, match=r"unit: saved tensor \d of shape \(4, 4\) was modified by an inplace operation"
        ):
            kept(unit(Site("unit"), keep))


def _by_pointer(x: Tensor) -> np.ndarray[Any, Any]:
    memory = (ctypes.c_float * x.numel()).from_address(x.data_ptr())
    return np.ctypeslib.as_array(memory).reshape(tuple(x.shape)).copy()


READERS: dict[str, Callable[[Tensor], Any]] = {
    "data_ptr": _by_pointer,
    "detached data_ptr": lambda x: _by_pointer(x.detach()),
    "numpy": lambda x: x.detach().numpy(),
    "array": lambda x: np.asarray(x.detach()),
    "dlpack": lambda x: np.from_dlpack(x.detach()),
    "tolist": lambda x: np.array(x.tolist(), dtype="float32"),
    "storage": lambda x: np.frombuffer(bytes(x.untyped_storage().tolist()), dtype="float32").reshape(tuple(x.shape)),
}


class _Invisible(torch.autograd.Function):
    """Reads its input behind the dispatcher's back and saves nothing, so that nothing visible needs its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[Tensor], Any]) -> Tensor:
        return torch.from_numpy(np.sin(read(x)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


@pytest.mark.parametrize("reader", READERS)
def test_a_kernel_the_dispatcher_cannot_see(reader: str) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        h = _Invisible.apply(torch.exp(x) + 1, READERS[reader])
        return (h @ w).sin() @ w

    site = Site("unit")
    with pytest.warns(ullage.UllageWarning, match="a stale op log"):
        seen = gradients(f, inputs((4, 4), (4, 4)), unit(site), 5)
    assert seen == gradients(f, inputs((4, 4), (4, 4)), plain, 5)
    # after three vain logs it is left at full replay
    assert site.skipped == 0 and site.stale == 3
    assert "full replay: what it saves changes from call to call" in site.notes


def test_random_draws_and_kept() -> None:
    """Dropout before, between and after kept matmuls: every generator ends where the plain step's does."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.5)
            x = F.dropout(self.a(x), 0.5) + torch.rand_like(x)
            return F.dropout(self.c(F.dropout(self.b(x).sin(), 0.3)), 0.1)

    def loss(model: nn.Module, wrap: Any) -> Tensor:
        return wrap(model, torch.randn(4, 8)).square().sum() + torch.rand(())

    site = Site("unit")
    assert steps(Model, loss, unit(site)) == steps(Model, loss, plain)
    assert (site.stale, site.notes) == (0, {})
    assert site.skipped > 0


def _sorted_values(x: Tensor, w: Tensor) -> Tensor:
    return torch.sort(x @ w, dim=-1)[0].exp().sin() @ w


def _sorted_indices(x: Tensor, w: Tensor) -> Tensor:
    return x.gather(1, torch.sort(x @ w, dim=-1)[1]).sin().cos() @ w


@pytest.mark.parametrize("f", [_sorted_values, _sorted_indices])
def test_several_outputs_one_kept(f: Callable[..., Tensor]) -> None:
    for keep in ([aten.sort.default, aten.mm.default], [aten.sort.default], "matmul_attention"):
        wrap = lambda fn, *a: ullage.checkpoint(fn, *a, keep=keep)  # noqa: B023, E731
        assert gradients(f, inputs((4, 4), (4, 4)), wrap, 3) == gradients(f, inputs((4, 4), (4, 4)), plain, 3)


def test_several_outputs_one_kept_split() -> None:
    """One storage, several saved views of it."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (x @ w).chunk(3, -1)
        return torch.softmax(q @ k.t(), -1) @ v.sin()

    site = Site("unit")
    shapes = ((6, 4), (4, 12))
    assert gradients(f, inputs(*shapes), unit(site), 3) == gradients(f, inputs(*shapes), plain, 3)
    assert site.skipped > 0 and site.stale == 0


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_replay_differs_from_this_forward_by_pythons_random(keep: str | None) -> None:
    """The first call shows that it draws on the host; from then on every replay draws the same."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).sin() @ w if random.random() < 0.5 else (x @ w).exp().cos()

    site = Site("unit")
    seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if keep else "error")  # the other branch's log is stale
        seen = gradients(f, inputs((4, 4), (4, 4)), unit(site, keep), 12)
    after = random.getstate()
    seed(3)
    assert seen == gradients(f, inputs((4, 4), (4, 4)), plain, 12)
    assert random.getstate() == after


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_replay_differs_from_this_forward_by_a_flag(keep: str | None) -> None:
    """A flag that changed between forward and backward: no replay can be right, and the error says where it parts."""
    flag = {"on": True}

    def f(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        return (h.sin() if flag["on"] else torch.cat([h, h]).sin()).cos()

    site = Site("unit")
    x, w = inputs((4, 4), (4, 4))
    out = unit(site, keep)(f, x, w)
    flag["on"] = False
    with pytest.raises(
        ullage.ReplayError,
        match=r"unit at .*test_breaking.py:\d+: the replay differs from the forward: saved tensor 2 is",
    ):
        if keep is None:
            out.sum().backward()
        else:
            with pytest.warns(ullage.UllageWarning, match="a stale op log"):
                out.sum().backward()


def test_a_stale_log_and_a_replay_that_equals_its_forward() -> None:
    """The flag changed before the forward: the log is stale, the replay is not; rebuilt in full."""
    flag = {"on": True}

    def f(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        return h.sin() if flag["on"] else h.exp().cos()

    site = Site("unit")
    gradients(f, inputs((4, 4), (4, 4)), unit(site), 2)
    flag["on"] = False
    with pytest.warns(ullage.UllageWarning, match="a stale op log"):
        seen = gradients(f, inputs((4, 4), (4, 4)), unit(site))
    assert seen == gradients(f, inputs((4, 4), (4, 4)), plain)
    assert site.stale == 1


def test_a_kept_output_behind_views_and_detach_is_handed_on() -> None:
    """The same value under another name: a view to the same shape, `detach`, `data`."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w).exp().view(4, 4).detach() + x.view(4, 4)).sin().cos() @ w

    def g(x: Tensor, w: Tensor) -> Tensor:
        h = ((x + 1).view(4, 4) @ w).sin().data.view(4, 4)
        return torch.where(h > h.sum().item(), x, w).sin().cos() @ w

    for fn in (f, g):
        site = Site("unit")
        assert gradients(fn, inputs((4, 4), (4, 4)), unit(site), 3) == gradients(fn, inputs((4, 4), (4, 4)), plain, 3)
        assert site.stale == 0 and site.skipped > 0, fn


def test_a_log_is_trusted_only_after_proof() -> None:
    """A selective replay that gives other bits (a write the dispatcher doesn't see) is tried once, and never again."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        h = (x + 1) @ w
        y = torch.ones(4, 4)
        np.multiply(y.numpy(), 3.0, out=y.numpy()) if type(h) is Tensor and not _skipping() else None
        return (h * y).sin()

    def _skipping() -> bool:
        return torch.utils._python_dispatch._len_torch_dispatch_stack() > 0 and ullage.is_recomputing()

    site = Site("unit")
    with pytest.warns(
        ullage.UllageWarning, match=r"unit: full replay: its selective replay gave other values \(saved tensor \d\)"
    ):
        seen = gradients(f, inputs((4, 4), (4, 4)), unit(site), 3)
    assert seen == gradients(f, inputs((4, 4), (4, 4)), plain, 3)
    assert (site.skipped, site.replays) == (0, 4)


def test_only_the_call_with_digests_proves_a_log() -> None:
    """Another unit of the structure, at its own first call, has none once a full replay of the structure was compared."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).sin().exp() @ w

    shared = Shared()
    x, w = inputs((4, 4), (4, 4))
    unit(Site("full", shared), None)(f, x, w).sum().backward()
    first, second = Site("first", shared), Site("second", shared)
    held = unit(first)(f, x, w)
    unit(second)(f, x, w).sum().backward()
    assert (second.skipped, second.replays) == (0, 1)
    assert not any(known.proof.done for known in shared.known.values())
    held.sum().backward()
    assert (first.skipped, [known.proof.done for known in shared.known.values()]) == (1, [True])
    unit(second)(f, x, w).sum().backward()
    assert second.skipped == 1


def test_a_log_whose_call_had_no_backward_is_made_again() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).sin() @ w

    site = Site("unit")
    unit(site)(f, *inputs((4, 4), (4, 4)))  # dropped: nothing proves its log
    assert gradients(f, inputs((4, 4), (4, 4)), unit(site), 2) == gradients(f, inputs((4, 4), (4, 4)), plain, 2)
    assert site.skipped == 2


@pytest.mark.parametrize("wrap", [plain, ours, selective], ids=["plain", "full", "selective"])
def test_mutation_in_the_unit(wrap: Any) -> None:
    """`exp` saves its result, `mul_` changes it: the plain step raises, so do we."""

    def f(x: Tensor) -> Tensor:
        h = torch.exp(x)
        h.mul_(2)
        return h @ h

    (x,) = inputs((4, 4))
    with pytest.raises(RuntimeError, match="inplace operation"):
        wrap(f, x).sum().backward()


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("keep", [None, "matmul_attention", "attention"])
def test_state_of_batch_norm(keep: str | None) -> None:
    def loss(model: nn.Module, wrap: Any) -> Tensor:
        x = torch.randn(2, 3, 8, 8)
        return (wrap(model, x) * wrap(model, x + 1)).sum()  # twice: the second call changes what the first one read

    site = Site("unit")
    assert steps(_Norm, loss, unit(site, keep)) == steps(_Norm, loss, plain)
    assert steps(_Norm, loss, torchs) != steps(_Norm, loss, plain)  # torch's replays count too


class _Log(Apart):
    """No state of a unit's: no replay puts it back."""

    def __init__(self) -> None:
        self.alive: list[Any] = []


_log = _Log()


@pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
def test_replay_packs_leak_nothing(wrap: Any) -> None:
    """A node that saves its own output must not be held by what the replay packs."""
    (x,) = inputs((64, 64))
    for _ in range(3):
        _log.alive.clear()

        def f(x: Tensor) -> Tensor:
            h = torch.exp(x @ x)
            _log.alive.append(weakref.ref(h.untyped_storage()))
            return torch.softmax(torch.sigmoid(h), -1).tanh().exp()

        out = wrap(f, x)
        out.sum().backward()
        del out
        assert len(_log.alive) >= 2
        assert frames() == 0
        assert [a for a in _log.alive if a() is not None] == []


def test_counts_of_a_selective_replay() -> None:
    """What is kept is not done again: no matmul of the forward runs in backward."""
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU())
    site = Site("unit")
    x = torch.randn(4, 8)
    for _ in range(2):
        out = unit(site)(net, x)
        backward = ops_in(lambda: out.sum().backward())  # noqa: B023
    plains = ops_in(lambda: net(x).sum().backward())
    assert backward.get(aten.addmm.default, 0) == 0
    assert plains[aten.addmm.default] == 2
    assert backward[aten.gelu.default] == 1  # the last one's output is saved by nobody
    assert bits(net[0].weight.grad) is not None
