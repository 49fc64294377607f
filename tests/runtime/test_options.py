"""The options that `ullage.checkpoint` has in common with torch's, and the transforms of `torch.func`."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as tc
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import ullage
from tests.runtime.steps import aten, bits, gradients, inputs, ops_in, ours, plain, selective, torchs, unit
from ullage.runtime import Site

both = pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
XW = ((4, 4), (4, 4))


def _f(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).sin().exp() @ w


def _tail(x: Tensor, w: Tensor) -> Tensor:
    """Its last matmul is of no use to a replay."""
    return ((x @ w).sin() @ w).detach() + x


# --- early stop ------------------------------------------------------------------------------------------------------


def _replayed(wrap: Any) -> int:
    x, w = inputs(*XW)
    out = wrap(lambda x, w: torch.clone((x * w).sin()).add(w), x, w)
    return ops_in(lambda: out.sum().backward()).get(aten.clone.default, 0)


def test_early_stop() -> None:
    assert _replayed(ours) == _replayed(torchs) == 0
    assert _replayed(functools.partial(ours, early_stop=False)) == 1
    assert _replayed(functools.partial(torchs, early_stop=False)) == 1
    with tc.set_checkpoint_early_stop(False):  # it has precedence, and counts in forward
        assert _replayed(functools.partial(ours, early_stop=True)) == 1


@both
def test_early_stop_passes_the_units_own_handlers(wrap: Any) -> None:
    caught = []

    def f(x: Tensor, w: Tensor) -> Tensor:
        try:
            return (x @ w).sin().exp()
        except Exception:  # torch's own stop is an Exception, and is caught here
            caught.append(1)
            raise

    assert gradients(f, inputs(*XW), wrap, 3) == gradients(f, inputs(*XW), plain, 3)
    assert caught == []


@both
def test_a_unit_that_swallows_everything(wrap: Any) -> None:
    def f(x: Tensor, w: Tensor) -> Any:
        try:
            y = (x @ w).sin().exp()
        except BaseException:
            y = x * 2
        return y * w

    assert gradients(f, inputs(*XW), wrap, 3) == gradients(f, inputs(*XW), plain, 3)


# --- context_fn ------------------------------------------------------------------------------------------------------


def test_context_fn_surrounds_forward_and_replay() -> None:
    seen = []

    class Context:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            seen.append(f"+{self.name}")

        def __exit__(self, *error: Any) -> None:
            seen.append(f"-{self.name}")

    def contexts() -> tuple[Any, Any]:
        return Context("forward"), Context("replay")

    assert gradients(_f, inputs(*XW), functools.partial(ours, context_fn=contexts)) == gradients(_f, inputs(*XW), plain)
    assert seen == ["+forward", "-forward", "+replay", "-replay"]


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("what", [_policy, [aten.mm.default]], ids=["policy", "list"])
def test_torchs_selective_contexts(what: Any) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, what)
    wrap = functools.partial(ours, context_fn=contexts)
    assert gradients(_f, inputs(*XW), wrap, 3) == gradients(_f, inputs(*XW), plain, 3)
    counts = []
    for call in (wrap, functools.partial(torchs, context_fn=contexts), plain):
        out = call(_f, *inputs(*XW))
        counts.append(ops_in(lambda: out.sum().backward())[aten.mm.default])  # noqa: B023
    assert counts[0] == counts[1] == counts[2]  # no matmul of the forward is done again


def test_options_that_mean_nothing() -> None:
    x, w = inputs(*XW)
    for given, match in (
        ({"use_reentrant": True}, "use_reentrant=True: ullage has the non-reentrant kind only"),
        (
            {"determinism_check": "sometimes"},
            "determinism_check='sometimes': expected one of 'default', 'none', 'values'",
        ),
        ({"context_fn": lambda: None, "keep": "attention"}, "context_fn: not together with keep"),
        ({"context_fn": lambda: None, "debug": True}, "context_fn: not together with debug"),
        ({"keep": 3}, "keep: expected a level's name"),
        (
            {"respect_saved_tensors_hooks": True, "keep": "attention"},
            "respect_saved_tensors_hooks=True: .*leave out keep",
        ),
    ):
        with pytest.raises(ullage.ArgumentError, match=match):
            ullage.checkpoint(_f, x, w, **given)
        with pytest.raises(ValueError):  # also what torch raises
            ullage.checkpoint(_f, x, w, **given)
    with pytest.raises(ullage.ArgumentError, match="function: expected something to call, got int"):
        ullage.checkpoint(3, x)


def test_respect_saved_tensors_hooks() -> None:
    for given in (None, False, True):
        wrap = functools.partial(ours, respect_saved_tensors_hooks=given)
        assert gradients(_f, inputs(*XW), wrap, 2) == gradients(_f, inputs(*XW), plain, 2)
    wrap = functools.partial(selective, respect_saved_tensors_hooks=False)
    assert gradients(_f, inputs(*XW), wrap, 2) == gradients(_f, inputs(*XW), plain, 2)
    seen: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.numel()), t)[1], lambda t: t):
        ullage.checkpoint(_f, *inputs(*XW), respect_saved_tensors_hooks=True)
    assert seen == [16, 16]  # its arguments: they are all that is held


def test_the_global_debug_setting_counts_for_context_fn_too() -> None:
    contexts = lambda: (nullcontext(), nullcontext())  # noqa: E731
    with tc.set_checkpoint_debug_enabled(True):
        with pytest.raises(ValueError, match="incompatible with non-default context_fn"):
            torchs(_f, *inputs(*XW), context_fn=contexts)
        with pytest.raises(
            ullage.ArgumentError, match=r"context_fn: not together with set_checkpoint_debug_enabled\(True\)"
        ):
            ullage.checkpoint(_f, *inputs(*XW), context_fn=contexts)
    with tc.set_checkpoint_debug_enabled(False):
        wrap = functools.partial(ours, context_fn=contexts, debug=True)
        assert gradients(_f, inputs(*XW), wrap) == gradients(_f, inputs(*XW), plain)


class _Swallows:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> bool:
        return True


def test_a_context_that_swallows_exceptions() -> None:
    def fails(x: Tensor, w: Tensor) -> Tensor:
        raise ValueError("of the forward")

    with pytest.raises(ullage.ReplayError, match="fails: the forward context of context_fn has swallowed an exception"):
        ullage.checkpoint(fails, *inputs(*XW), context_fn=lambda: (_Swallows(), nullcontext()))
    with pytest.raises(ValueError, match="of the forward"):
        ullage.checkpoint(fails, *inputs(*XW), context_fn=lambda: (nullcontext(), _Swallows()))
    both = functools.partial(
        ours, context_fn=lambda: (_Swallows(), _Swallows())
    )  # nor may it catch the end of a replay
    assert gradients(_f, inputs(*XW), both, 2) == gradients(_f, inputs(*XW), plain, 2)


@contextmanager
def _default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


_seen = io.StringIO()  # of a file no replay puts anything back


def _notes_device(x: Tensor, w: Tensor) -> Tensor:
    _seen.write(torch.zeros(1).device.type + " ")
    return (x @ w).sin().exp()


def test_a_default_device_in_context_fn() -> None:
    def contexts(first: str, again: str) -> Any:
        return lambda: (_default_device(first), _default_device(again))

    for around, inside, wanted in (("meta", None, "meta"), (None, "meta", "meta"), (None, None, "cpu")):
        _seen.truncate(_seen.seek(0))
        x, w = inputs(*XW)
        context_fn = contexts(inside, inside) if inside else lambda: (nullcontext(), nullcontext())
        with torch.device(around) if around else nullcontext():
            out = ullage.checkpoint(_notes_device, x, w, context_fn=context_fn).sum()
        with torch.device("meta") if not around else nullcontext():
            torch.autograd.backward(out)
        assert _seen.getvalue().split() == [wanted, wanted]
        assert torch._C._len_torch_function_stack() == 0
    a = torch.ones((), device="meta", requires_grad=True)
    with _default_device("meta"):
        ullage.checkpoint(lambda x: x.sin().cos(), a, context_fn=contexts("meta", "meta")).backward()
    assert a.grad.device.type == "meta"
    while torch._C._len_torch_function_stack():  # torch's own: it can't know that a context within has ended
        torch._C._pop_torch_function_stack()


def test_the_replay_has_no_default_device_where_the_forward_had_none() -> None:
    for wrap in (ours, selective):
        _seen.truncate(_seen.seek(0))
        out = wrap(_notes_device, *inputs(*XW)).sum()
        with torch.device("meta"):
            torch.autograd.backward(out)
        assert _seen.getvalue().split() == ["cpu", "cpu"]


# --- checks ----------------------------------------------------------------------------------------------------------

_flag = {"shape": False, "value": False, "more": False, "fewer": False}  # a global: replays see what it is now


def _differs(x: Tensor, w: Tensor) -> Tensor:
    h = torch.cat([x, x]) if _flag["shape"] else x
    h = (h * 3 if _flag["value"] else h).exp()
    if _flag["fewer"]:
        return h
    return h.sin().cos() if _flag["more"] else h.sin()


def _backward_after(flag: str, **options: Any) -> Any:
    x, w = inputs(*XW)
    out = ullage.checkpoint(_differs, x, w, **options)
    _flag[flag] = True
    try:
        out.sum().backward()
    finally:
        _flag[flag] = False
    return bits(x.grad)


def test_determinism_check_default() -> None:
    where = r"_differs at runtime/test_options.py:\d+: the replay differs from the forward: "
    with pytest.raises(
        tc.CheckpointError, match=where + r"saved tensor 0 is torch.float32 \(8, 4\) with strides \(4, 1\) on cpu"
    ):
        _backward_after("shape")
    with pytest.raises(ullage.ReplayError, match=r"its forward saved 2 tensors, its replay 1\."):
        _backward_after("fewer")
    with pytest.raises(ullage.ReplayError, match=r"saves more than the 2 tensors"):
        _backward_after("more", early_stop=False)
    _backward_after("more")  # early stop: what was asked for is back before they part


def test_determinism_check_none() -> None:
    """Nothing is compared: what is rebuilt is used as it is; autograd itself may object to its shape."""
    x, w = inputs(*XW)
    (x * 3).exp().sin().sum().backward()
    assert _backward_after("more", determinism_check="none", early_stop=False) is not None
    with pytest.raises(RuntimeError):
        _backward_after("shape", determinism_check="none")
    with pytest.warns(ullage.UllageWarning, match="other values than its forward"):
        _checkpoint_once("none")
    ullage.runtime.forward._checkpoint._sites.clear()  # it is kept from then on
    with pytest.raises(ullage.ReplayError, match=r"its forward saved 2 tensors, its replay 1\."):  # as torch
        _backward_after("fewer", determinism_check="none")


def _checkpoint_once(check: str) -> None:
    ullage.runtime.forward._checkpoint._sites.clear()
    _backward_after("value", determinism_check=check)


def test_determinism_check_values() -> None:
    match = r"_differs: its replay gave other values than its forward \(saved tensor 0, shape \(4, 4\)\)"
    with pytest.raises(ullage.ReplayError, match=match):
        _backward_after("value", determinism_check="values")
    for _ in range(2):  # kept from then on
        _backward_after("value", determinism_check="values")
    # by default only the first calls are compared, with a warning
    with pytest.warns(ullage.UllageWarning, match=match):
        _checkpoint_once("default")


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_determinism_check_values_of_what_is_right(keep: str | None) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Conv2d(3, 2, 3))
    for _ in range(3):
        ullage.checkpoint(net, torch.randn(2, 2, 8, 8), keep=keep, determinism_check="values").sum().backward()
    wrap = functools.partial(ours, keep=keep, determinism_check="values")
    assert gradients(_f, inputs(*XW), wrap, 3) == gradients(_f, inputs(*XW), plain, 3)


def test_debug_shows_where_they_part() -> None:
    for setting in ({"debug": True}, {}):
        with tc.set_checkpoint_debug_enabled(True) if not setting else torch.enable_grad():
            with pytest.raises(ullage.ReplayError) as error:
                _backward_after("shape", **setting)
        text = str(error.value)
        assert "ops agree up to number 0:" in text
        assert "forward: aten.exp.default at runtime/test_options.py" in text
        assert "replay:  aten.cat.default at runtime/test_options.py" in text
    with pytest.raises(ullage.ReplayError, match="Pass debug=True to see where they part"):
        _backward_after("shape")


def test_without_preserving_the_generators() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return torch.dropout((x @ w).exp(), 0.5, True).sin()

    def run(call: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        return gradients(f, inputs(*XW), functools.partial(call, **options)), bits(torch.get_rng_state())

    with pytest.warns(ullage.UllageWarning, match="other values than its forward"):
        loose = run(ours, preserve_rng_state=False)
    assert loose[0] != run(plain)[0]
    assert loose[0] == run(torchs, preserve_rng_state=False)[0]  # the replay draws what comes next
    assert run(ours) == run(plain)


# --- decorator -------------------------------------------------------------------------------------------------------


def test_decorator_forms() -> None:
    @ullage.checkpoint
    def bare(x: Tensor, w: Tensor) -> Tensor:
        """Its docstring."""
        return _f(x, w)

    @ullage.checkpoint(keep="matmul_attention")
    def with_options(x: Tensor, w: Tensor) -> Tensor:
        return _f(x, w)

    class Module(nn.Module):
        @ullage.checkpoint(keep="attention", early_stop=False)
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return _f(x, w)

    assert (bare.__name__, bare.__doc__) == ("bare", "Its docstring.")
    for fn in (bare, with_options, Module()):
        assert gradients(fn, inputs(*XW), plain, 3) == gradients(_f, inputs(*XW), plain, 3)

    (x,) = inputs((4, 4))

    @ullage.checkpoint()
    def no_arguments() -> Tensor:
        return x.exp().sin()

    no_arguments().sum().backward()
    assert torch.equal(x.grad, x.exp().cos() * x.exp())


# --- torch.func, subclasses ------------------------------------------------------------------------------------------


# of torch 2.11, whose checkpoint saves its arguments by a Function that has no rules for other transforms
HAS_FUNCTION = hasattr(tc, "_NoopSaveInputs")
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Any]] = {
    "grad": lambda f, x, w: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x, w: torch.func.vmap(f)(torch.stack([x, w])),
    "jvp": lambda f, x, w: torch.func.jvp(f, (x,), (w,)),
    "vjp": lambda f, x, w: torch.func.vjp(f, x)[1](w),
    "jacrev": lambda f, x, w: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, w: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, w: torch.func.hessian(lambda x: f(x).sum())(x),
}


@both
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name: str, wrap: Any) -> None:
    """What works with torch's checkpoint works; what torch refuses (hooks under a grad transform, in 2.11 more) is refused alike."""
    x, w = inputs(*XW, grad=False)
    run = lambda call: bits(TRANSFORMS[name](lambda x: call(_f, x, w), x, w))  # noqa: E731
    try:
        torchs_own = run(torchs)
    except RuntimeError as error:
        hooks = "saved tensor hooks" in str(error) and name in ("grad", "vjp", "jacrev", "hessian")
        assert hooks or HAS_FUNCTION
        with pytest.raises(type(error), match=re.escape(str(error)[:50])):
            run(wrap)
        return
    assert run(wrap) == torchs_own == run(plain)


@both
def test_forward_mode(wrap: Any) -> None:
    import torch.autograd.forward_ad as fwd

    x, w = inputs(*XW)
    for call in (plain, wrap):
        if call is wrap and HAS_FUNCTION:
            with pytest.raises(NotImplementedError, match="jvp"), fwd.dual_level():
                call(_f, fwd.make_dual(x, w.detach()), w)
            return
        with fwd.dual_level():
            tangent = fwd.unpack_dual(call(_f, fwd.make_dual(x, w.detach()), w)).tangent
            if call is plain:
                truth = bits(tangent)
    assert bits(tangent) == truth


@both
def test_tensor_subclasses(wrap: Any) -> None:
    """Full replay."""

    def run(call: Any) -> Any:
        a, b, w = inputs((4, 4), (4, 4), (4, 4))
        for _ in range(3):
            out = call(_f, TwoTensor(a, b), w)
            assert isinstance(out, TwoTensor)
            out.sum().backward()
        both = [g for t in (a, b, w) if (g := t.grad) is not None]
        return [bits(t.a) + bits(t.b) if isinstance(t, TwoTensor) else bits(t) for t in both]

    assert run(wrap) == run(plain)


def test_selective_on_a_subclass_says_why() -> None:
    a, b, w = inputs((4, 4), (4, 4), (4, 4))
    site = Site("unit")
    for _ in range(2):
        unit(site)(_f, TwoTensor(a, b), w).sum().backward()
    assert site.skipped == 0
    assert any("TwoTensor, a subclass of Tensor" in note for note in site.notes)
