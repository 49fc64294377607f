"""`context_fn`, and torch's selective checkpointing through it."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tests.runtime.torch_cases._case import Checkpoint, case, gradients, leaf, raises, same
from tests.runtime.torch_cases.early_stop import Count

aten = torch.ops.aten
PLAIN = "TestAutograd.test_checkpointing_without_reentrant_with_context_fn"


def _saving(what: Any, **options: Any) -> Callable[[], Any]:
    return functools.partial(create_selective_checkpoint_contexts, what, **options)


def _policy(*ops: Any) -> Any:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


@case(PLAIN)
def contexts_surround_forward_and_replay(checkpoint: Checkpoint) -> None:
    """Each its own, once."""
    seen: list[str] = []

    @contextlib.contextmanager
    def noting(name: str) -> Iterator[None]:
        seen.append(f"+{name}")
        yield
        seen.append(f"-{name}")

    x = leaf(3)
    out = checkpoint(lambda x: x.exp().sin(), x, context_fn=lambda: (noting("a"), noting("b")))
    assert seen == ["+a", "-a"]
    with contextlib.suppress(Exception):
        out.sum().backward()
    assert seen[:3] == ["+a", "-a", "+b"]
    same(x.grad, x.exp().cos() * x.exp())


@case(PLAIN)
def a_dispatch_mode_as_context(checkpoint: Checkpoint) -> None:
    """It sees the ops of its own run."""

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    forward, replay = Names(), Names()
    checkpoint(lambda x: x.exp().sin().cos(), leaf(3), context_fn=lambda: (forward, replay)).sum().backward()
    assert [n for n in forward.names if "detach" not in n] == [
        "aten.exp.default",
        "aten.sin.default",
        "aten.cos.default",
    ]
    assert "aten.exp.default" in replay.names and "aten.sin.default" in replay.names


class _Swallows:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> bool:
        return True


def _fails(x: Tensor) -> Tensor:
    raise ValueError("of the forward")


@case()
def a_context_that_swallows_an_exception(checkpoint: Checkpoint) -> None:
    """There is no output then: an error says so."""
    contexts = lambda: (_Swallows(), contextlib.nullcontext())  # noqa: E731
    raises(RuntimeError, "context_fn", lambda: checkpoint(_fails, leaf(3), context_fn=contexts))


@case()
def an_exception_of_the_forward_comes_out(checkpoint: Checkpoint) -> None:
    """Through contexts that let it."""
    contexts = lambda: (contextlib.nullcontext(), contextlib.nullcontext())  # noqa: E731
    raises(ValueError, "of the forward", lambda: checkpoint(_fails, leaf(3), context_fn=contexts))


@contextlib.contextmanager
def _device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def _no_device_left() -> None:
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()


@case("TestAutograd.test_checkpoint_device_context_fn")
def a_default_device_around_and_in_the_contexts(checkpoint: Checkpoint) -> None:
    """Set and put back by each of them."""
    try:
        with _device("meta"):
            a = torch.ones((), requires_grad=True)
            contexts = lambda: (contextlib.nullcontext(), _device("meta"))  # noqa: E731
            checkpoint(lambda x: x.sin().cos(), a, context_fn=contexts).backward()
        assert a.grad is not None and a.grad.device.type == "meta"
    finally:
        _no_device_left()


@case("TestAutograd.test_checkpoint_device_context_fn")
def a_default_device_around_forward(checkpoint: Checkpoint) -> None:
    """Is in force in the replay, too."""
    made: list[str] = []

    class Makes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.zeros.default:
                made.append(str(kwargs["device"]))
            return func(*args, **(kwargs or {}))

    with torch.device("cpu"):
        out = checkpoint(lambda x: (x + torch.zeros(3)).sin().exp(), leaf(3))
    with Makes():
        out.sum().backward()
    assert made == ["cpu"]


# --- selective -------------------------------------------------------------------------------------------------------


def _matmuls(checkpoint: Checkpoint, what: Any) -> None:
    f = lambda x, y: torch.mm(x.cos(), y).sin()  # noqa: E731
    x, y = leaf(4, 4), leaf(4, 4)
    out = checkpoint(f, x, y, context_fn=_saving(what))
    with Count(aten.mm.default) as count:
        grads = torch.autograd.grad(out.sum(), (x, y))
    assert count.calls == 2, count.calls  # backward's own
    same(grads, gradients(f, x, y))


FLOPS = "TestSelectiveActivationCheckpoint.test_flops_and_mem"


@case(FLOPS)
def a_list_of_ops_that_are_saved(checkpoint: Checkpoint) -> None:
    """They do not run again."""
    _matmuls(checkpoint, [aten.mm.default])


@case(FLOPS)
def a_policy(checkpoint: Checkpoint) -> None:
    """It says it per op."""
    _matmuls(checkpoint, _policy(aten.mm.default))


@case(FLOPS)
def a_policy_that_answers_yes_or_no(checkpoint: Checkpoint) -> None:
    """As the older kind did."""
    _matmuls(checkpoint, lambda ctx, op, *args, **kwargs: op is aten.mm.default)


@case("TestSelectiveActivationCheckpoint.test_output_already_has_autograd_meta")
def a_view_of_integers_is_saved(checkpoint: Checkpoint) -> None:
    """A view that is no part of a graph."""
    x, y = torch.tensor([1, 2, 3]), leaf(3)
    out = checkpoint(lambda x, y: (x.view(-1), y.sin().cos()), x, y, context_fn=_saving([aten.view.default]))
    same(torch.autograd.grad(out[1].sum(), y), torch.autograd.grad(y.sin().cos().sum(), y))


@case("TestSelectiveActivationCheckpoint.test_bad_inputs")
def lists_that_mean_nothing(checkpoint: Checkpoint) -> None:
    """torch's own checks of them come out of the call."""
    call = lambda what: lambda: checkpoint(torch.sin, leaf(3), context_fn=_saving(what))  # noqa: E731
    raises(ValueError, "to be an OpOverload", call([2]))
    raises(ValueError, "specific OpOverload", call([aten.sin]))
    raises(TypeError, "either a function or a list", call(2))


@case("TestSelectiveActivationCheckpoint.test_policy_with_state")
def a_policy_with_state(checkpoint: Checkpoint) -> None:
    """It is asked once per op of the forward, in order."""
    asked: list[str] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if not ctx.is_recompute:
            asked.append(str(op))
        return CheckpointPolicy.PREFER_RECOMPUTE

    x = leaf(3)
    f = lambda x: x.sin().sin().sin()  # noqa: E731
    checkpoint(f, x, context_fn=_saving(policy, allow_cache_entry_mutation=True)).sum().backward()
    assert [a for a in asked if "sin" in a] == ["aten.sin.default"] * 3
    same(x.grad, torch.autograd.grad(f(x).sum(), x))


class _Mark:
    pass


@case("TestSelectiveActivationCheckpoint.test_storage_lifetime")
def what_is_saved_goes_with_the_graph(checkpoint: Checkpoint) -> None:
    """Without a collector, and after a backward that keeps the graph."""
    policy = lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE  # noqa: E731
    gc.disable()
    try:
        for backward in (False, True):
            x = leaf(3)
            out = checkpoint(lambda x: x.cos().exp().sin(), x, context_fn=_saving(policy))
            if backward:
                out.sum().backward(retain_graph=True)
                same(x.grad, torch.autograd.grad(x.cos().exp().sin().sum(), x))
            mark = out.grad_fn.metadata["mark"] = _Mark()
            mark = weakref.ref(mark)
            del out
            assert mark() is None, "the graph outlives the output"
    finally:
        gc.enable()


def _changes_what_is_saved(x: Tensor) -> Tensor:
    return x.sin().mul_(2).cos().exp()


VERSION = "TestSelectiveActivationCheckpoint.test_version_counter"


@case(VERSION)
def what_is_saved_is_written_to(checkpoint: Checkpoint) -> None:
    """An error."""
    out = checkpoint(_changes_what_is_saved, leaf(3), context_fn=_saving(_policy(aten.sin.default)))
    raises(RuntimeError, "mutated", out.sum().backward)


@case(VERSION)
def what_is_saved_may_be_written_to(checkpoint: Checkpoint) -> None:
    """`allow_cache_entry_mutation`: no error, at the user's own risk."""
    contexts = _saving(_policy(aten.sin.default), allow_cache_entry_mutation=True)
    x = leaf(3)
    checkpoint(_changes_what_is_saved, x, context_fn=contexts).sum().backward()
    assert x.grad is not None


@case("TestSelectiveActivationCheckpoint.test_function_with_more_than_one_output")
def an_op_with_two_outputs(checkpoint: Checkpoint) -> None:
    """Both are saved."""

    def f(x: Tensor) -> Tensor:
        a, b = torch.var_mean(x)
        return a * b

    x = leaf(3)
    out = checkpoint(f, x, context_fn=_saving(_policy(aten.var_mean.correction)))
    same(torch.autograd.grad(out, x), torch.autograd.grad(f(x), x))


_ops = torch.library.Library("ullage_torch_cases", "DEF")
_ops.define("sin_and_number(Tensor x) -> (Tensor, int)")
_runs: list[int] = []


def _sin_and_number(x: Tensor) -> tuple[Tensor, int]:
    _runs.append(1)
    return x.sin(), 2


_ops.impl("sin_and_number", _sin_and_number, "CPU")
torch.library.register_autograd(
    "ullage_torch_cases::sin_and_number",
    lambda ctx, grad, _: grad * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@case("TestSelectiveActivationCheckpoint.test_function_with_non_tensor_output")
def an_op_with_a_number_as_output(checkpoint: Checkpoint) -> None:
    """It does not run again."""
    op = torch.ops.ullage_torch_cases.sin_and_number
    f = lambda x: (op(x)[0] * x.sin().exp()).sin()  # noqa: E731
    x = leaf(3)
    _runs.clear()
    grads = torch.autograd.grad(checkpoint(f, x, context_fn=_saving([op.default])).sum(), x)
    assert len(_runs) == 1
    same(grads, torch.autograd.grad(f(x).sum(), x))


@case("TestSelectiveActivationCheckpoint.test_can_only_trigger_recompute_once")
def a_second_backward_of_torchs_selective_kind(checkpoint: Checkpoint) -> None:
    """Its contexts allow one."""
    out = checkpoint(lambda x: x.sin().cos().exp(), leaf(3), context_fn=_saving(_policy(aten.sin.default)))
    out.sum().backward(retain_graph=True)
    raises(RuntimeError, "backward an extra time", lambda: out.sum().backward(retain_graph=True))


class _Sized(Tensor):
    """A wrapper whose sizes are asked of it."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Sized:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), None, None, inner.dtype, inner.layout, inner.device, False, inner.requires_grad, "sizes"
        )  # fmt: skip
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = torch.utils._pytree.tree_map_only(cls, lambda x: x.inner, args)
        return torch.utils._pytree.tree_map_only(Tensor, cls, func(*inner, **(kwargs or {})))


@case("TestSelectiveActivationCheckpoint.test_subclass_dispatching_sizes")
def a_subclass_that_is_asked_for_its_sizes(checkpoint: Checkpoint) -> None:
    """These questions are no ops that a policy saves."""

    def f(x: Tensor) -> Tensor:
        out = (x * x.sum()).view(-1).view(4, 3)
        assert list(out.grad_fn._saved_self_sym_sizes) == [12]
        return out.exp()

    x = leaf(4, 3)
    checkpoint(f, _Sized(x), context_fn=_saving(_policy(aten.sym_size.default))).sum().backward()
