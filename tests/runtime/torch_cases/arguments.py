"""What may be called with what: modules, segments, tensors of all kinds, none at all."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import torch
import torch.utils.checkpoint as tc
from torch import Tensor, nn

import ullage
from tests.runtime.torch_cases._case import Checkpoint, case, gradients, leaf, ours, raises, same


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 4), nn.Tanh())


def _segments(checkpoint: Checkpoint, modules: list[nn.Module], segments: int, x: Tensor) -> Tensor:
    """As torch's `checkpoint_sequential`, which calls torch's checkpoint: all segments but the last."""
    size = len(modules) // segments

    def run(part: list[nn.Module]) -> Any:
        def forward(x: Tensor) -> Tensor:
            for m in part:
                x = m(x)
            return x

        return forward

    for n in range(segments - 1):
        x = checkpoint(run(modules[n * size : (n + 1) * size]), x)
    return run(modules[(segments - 1) * size :])(x)


def _grads(net: nn.Module, out: Tensor, *more: Tensor) -> list[Tensor | None]:
    net.zero_grad()
    out.sum().backward()
    return [p.grad.clone() for p in net.parameters()] + [t.grad for t in more]  # type: ignore[union-attr]


def _split(checkpoint: Checkpoint, module_list: bool, nested: bool) -> None:
    plain = _net()
    modules = list(plain)
    if nested:
        modules = [nn.Sequential(*modules[:3]), *modules[3:]]
    if module_list:
        modules = list(nn.ModuleList(modules))
    for segments in (1, 2, 3):
        a, b = leaf(5, 6), None
        b = a.detach().clone().requires_grad_()
        wanted = _grads(plain, plain(a), a)
        same(_grads(plain, _segments(checkpoint, modules, segments, b), b), wanted)


@case("TestCheckpoint.test_checkpoint")
def segments_of_a_sequential(checkpoint: Checkpoint) -> None:
    """One, two and three of them."""
    _split(checkpoint, False, False)


@case("TestCheckpoint.test_checkpoint_module_list")
def segments_of_a_module_list(checkpoint: Checkpoint) -> None:
    """The same over a `ModuleList`."""
    _split(checkpoint, True, False)


@case("TestCheckpoint.test_checkpoint_module_list")
def segments_of_nested_modules(checkpoint: Checkpoint) -> None:
    """A `Sequential` in it."""
    _split(checkpoint, True, True)


@case()
def torchs_own_sequential_with_this_checkpoint_inside(checkpoint: Checkpoint) -> None:
    """`checkpoint_sequential` of modules that are units themselves."""
    net, x = _net(), leaf(5, 6)
    y = x.detach().clone().requires_grad_()
    wanted = _grads(net, net(x), x)
    units = [lambda t, m=m: checkpoint(m, t) for m in net]
    same(_grads(net, tc.checkpoint_sequential(units, 3, y, use_reentrant=False), y), wanted)


@case("TestCheckpoint.test_checkpoint_sequential_deprecated_multiple_args")
def sequential_takes_one_argument(checkpoint: Checkpoint) -> None:
    """torch's own check."""
    raises(
        TypeError,
        "multiple values for argument 'use_reentrant'",
        lambda: tc.checkpoint_sequential([checkpoint], 1, 1, 2, use_reentrant=False),
    )  # type: ignore[misc]


@case()
def a_unit_runs_twice_in_all(checkpoint: Checkpoint) -> None:
    """Once in forward, once in backward; without grad mode once."""
    from tests.runtime.torch_cases.early_stop import Count

    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    for grad, calls in ((True, 4), (False, 2)):
        with Count(torch.ops.aten.addmm.default) as count, torch.set_grad_enabled(grad):
            out = checkpoint(net, leaf(2, 4))
            if grad:
                out.sum().backward()
        assert count.calls == calls


@case("TestCheckpoint.test_checkpoint_valid")
def gradients_by_grad(checkpoint: Checkpoint) -> None:
    """`torch.autograd.grad`, which the reentrant kind refuses."""
    net, x = _net(), leaf(5, 6)
    same(torch.autograd.grad(checkpoint(net, x).sum(), x), torch.autograd.grad(net(x).sum(), x))


@case("TestCheckpoint.test_checkpoint_non_tensor")
def none_as_an_argument(checkpoint: Checkpoint) -> None:
    """In either place."""
    f = lambda x, y: x.exp().sin() if y is None else (x or y).exp().sin()  # noqa: E731
    x = leaf(3)
    same(gradients(lambda x: checkpoint(f, x, None), x), gradients(lambda x: x.exp().sin(), x))
    same(gradients(lambda x: checkpoint(f, None, x), x), gradients(lambda x: x.exp().sin(), x))


@case("TestCheckpoint.test_checkpoint_non_tensor_inputs_outputs")
def numbers_and_nothing_as_outputs(checkpoint: Checkpoint) -> None:
    """Tuples with tensors, bools, None."""

    def f(x: Tensor, scale: float, flag: bool) -> Any:
        return x.exp() * scale, flag, None, x.sin()

    x = leaf(3)
    a, flag, nothing, b = checkpoint(f, x, 2.0, True)
    assert flag is True and nothing is None
    (a + b).sum().backward()
    same(x.grad, torch.autograd.grad((x.exp() * 2.0 + x.sin()).sum(), x))


@case("TestCheckpoint.test_checkpoint_no_tensors")
def no_tensors_at_all(checkpoint: Checkpoint) -> None:
    """Then it is a plain call."""
    assert checkpoint(lambda a, b: (a + b, "text"), 2, 3) == (5, "text")


@case("TestCheckpoint.test_checkpoint_partial_grad")
def an_output_without_gradient(checkpoint: Checkpoint) -> None:
    """Of two, one comes of a tensor that needs none."""
    a, b = leaf(3), torch.randn(3)
    out = checkpoint(lambda a, b: (a.exp().sin(), b.exp()), a, b)
    assert out[0].requires_grad and not out[1].requires_grad
    same(torch.autograd.grad(out[0].sum(), a), torch.autograd.grad(a.exp().sin().sum(), a))


@case()
def nothing_needs_a_gradient(checkpoint: Checkpoint) -> None:
    """The output needs none, and nothing is asked."""
    assert not checkpoint(lambda x: x.exp().sin(), torch.randn(3)).requires_grad


Point = namedtuple("Point", ["x", "y"])


def _arbitrary(checkpoint: Checkpoint, pack: Any, unpack: Any) -> None:
    net, x = nn.Linear(3, 3), leaf(2, 3)
    f = lambda held: pack(net(unpack(held)).exp())  # noqa: E731
    out = unpack(checkpoint(f, pack(x * 1)))
    same(
        torch.autograd.grad(out.sum(), [x, *net.parameters()]),
        torch.autograd.grad(net(x * 1).exp().sum(), [x, *net.parameters()]),
    )


ARBITRARY = "TestAutograd.test_checkpointing_without_reentrant_arbitrary_input_output"


@case(ARBITRARY)
def dicts_in_and_out(checkpoint: Checkpoint) -> None:
    """Tensors in dicts have their gradients."""
    _arbitrary(checkpoint, lambda t: {"t": t, "n": 1}, lambda d: d["t"])


@case()
def objects_in_and_out(checkpoint: Checkpoint) -> None:
    """Tensors in objects have their gradients."""

    class Held:
        def __init__(self, t: Tensor) -> None:
            self.t = t

    _arbitrary(checkpoint, Held, lambda held: held.t)


@case()
def named_tuples_in_and_out(checkpoint: Checkpoint) -> None:
    """Their class is kept."""
    _arbitrary(checkpoint, lambda t: Point(t, OrderedDict(a=1)), lambda p: p.x)


def _requires(checkpoint: Checkpoint, grad: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(2, 4, requires_grad=grad)
    more = [x] if grad else []
    wanted = torch.autograd.grad(net(x).sum(), [*more, *net.parameters()])
    same(torch.autograd.grad(checkpoint(net, x).sum(), [*more, *net.parameters()]), wanted)


@case("TestAutograd.test_checkpointing_without_reentrant")
def an_input_that_needs_a_gradient(checkpoint: Checkpoint) -> None:
    """It and the parameters have theirs."""
    _requires(checkpoint, True)


@case("TestAutograd.test_checkpointing_without_reentrant")
def an_input_that_needs_none(checkpoint: Checkpoint) -> None:
    """The parameters have theirs."""
    _requires(checkpoint, False)


@case("TestAutograd.test_checkpointing_without_reentrant_detached_tensor")
def a_detached_part(checkpoint: Checkpoint) -> None:
    """`detach` and `no_grad` inside."""

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.exp()
        return (x * scale).sin() * x.detach().cos()

    x = leaf(3)
    same(gradients(lambda x: checkpoint(f, x), x), gradients(f, x))


@case("TestAutograd.test_checkpointing_without_reentrant_saved_object_identity")
def what_a_function_saves_is_the_same_object(checkpoint: Checkpoint) -> None:
    """An argument that needs no gradient, saved by a custom Function, is itself in backward."""
    found: list[Any] = []

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            found.extend(ctx.saved_tensors)
            return grad, None

    y = torch.ones(())
    checkpoint(Saves.apply, leaf(), y).backward()
    assert len(found) == 1 and found[0] is y


@case()
def an_argument_is_the_same_object(checkpoint: Checkpoint) -> None:
    """In forward; and aliases of one tensor are one."""
    x = leaf(3)

    def f(a: Tensor, b: Tensor) -> Tensor:
        assert a is b
        return (a * b).exp().sin()

    same(gradients(lambda x: checkpoint(f, x, x), x), gradients(lambda x: (x * x).exp().sin(), x))


@case()
def a_misspelt_option_of_the_function(checkpoint: Checkpoint) -> None:
    """Keywords go to the function, which refuses what it does not know."""
    raises(
        TypeError, "unexpected keyword argument 'scalee'", lambda: checkpoint(lambda x, scale=1: x, leaf(3), scalee=2)
    )


@case("TestAutograd.test_checkpoint_warns_if_use_reentrant_not_passed_explcitly", row="`use_reentrant` left out")
def use_reentrant_left_out(checkpoint: Checkpoint) -> None:
    """torch warns, and takes the reentrant kind."""
    import warnings

    call = ullage.checkpoint if checkpoint is ours else tc.checkpoint
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call(torch.sin, leaf(3))
    assert any("use_reentrant" in str(w.message) for w in told), "no warning"


@case("TestCheckpoint.test_checkpoint_sequential_deprecated_no_args")
def sequential_needs_an_argument(checkpoint: Checkpoint) -> None:
    """torch's own check."""
    raises(TypeError, "missing 1 required positional argument", lambda: tc.checkpoint_sequential([checkpoint], 1))  # type: ignore[call-arg]


@case("TestAutograd.test_checkpoint_sequential_warns_if_use_reentrant_not_passed_explcitly")
def sequential_without_use_reentrant(checkpoint: Checkpoint) -> None:
    """torch's own warning, over units of either kind."""
    import warnings

    units = [lambda t: checkpoint(lambda u: u.exp().sin(), t)] * 3
    for options, told in (({"use_reentrant": False}, 0), ({}, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tc.checkpoint_sequential(units, 1, leaf(3), **options)
        assert sum("use_reentrant" in str(w.message) for w in caught) == told


@case("TestCheckpoint.test_checkpoint_trigger", row="BatchNorm statistics, counters, caches")
def a_counter_of_a_module(checkpoint: Checkpoint) -> None:
    """It counts the replay, too."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counter = 0

        def forward(self, x: Tensor) -> Tensor:
            self.counter += 1
            return x * torch.tensor(2.0)

    modules = [Net() for _ in range(4)]
    x = leaf(3, 4)
    out = modules[2](checkpoint(lambda x: modules[1](modules[0](x)), x))
    assert [m.counter for m in modules] == [1, 1, 1, 0]
    out.sum().backward()
    assert [m.counter for m in modules] == [2, 2, 1, 0], "the replay counts nothing"


@case("TestAutograd.test_checkpointing_without_reentrant_with_context_fn")
def contexts_and_the_reentrant_kind(checkpoint: Checkpoint) -> None:
    """A ValueError."""
    call = ullage.checkpoint if checkpoint is ours else tc.checkpoint
    contexts = lambda: (torch.enable_grad(), torch.enable_grad())  # noqa: E731
    raises(ValueError, "use_reentrant", lambda: call(torch.sin, leaf(3), use_reentrant=True, context_fn=contexts))


@case("TestAutograd.test_checkpointing_without_reentrant_dataparallel")
def data_parallel_on_a_cpu(checkpoint: Checkpoint) -> None:
    """A wrapped module as the unit."""
    net, x = nn.Linear(2, 2, bias=False), leaf(2, 2)
    same(gradients(lambda x: checkpoint(nn.DataParallel(net), x), x), gradients(net, x))


@case("TestAutograd.test_checkpointing", row="`use_reentrant` left out")
def the_reentrant_kind(checkpoint: Checkpoint) -> None:
    """`use_reentrant=True`."""
    call = ullage.checkpoint if checkpoint is ours else tc.checkpoint
    x = leaf(3)
    call(lambda x: x.exp().sin(), x, use_reentrant=True).sum().backward()
    same(x.grad, x.exp().cos() * x.exp())
