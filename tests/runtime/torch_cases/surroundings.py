"""What surrounds a unit: generators, autocast, hooks, transforms, threads, wrappers of torch.distributed."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as tc
from torch import Tensor, nn

from tests.runtime.torch_cases._case import Checkpoint, Skip, case, gradients, leaf, raises, same


def _noisy(x: Tensor) -> Tensor:
    return F.dropout(x.exp(), 0.5).sin()


@case("TestCheckpoint.test_checkpoint_rng_cpu")
def the_generator_is_the_forwards(checkpoint: Checkpoint) -> None:
    """Draws come again; and after backward it is where it was."""
    x = leaf(50)
    torch.manual_seed(3)
    wanted = gradients(_noisy, x)
    torch.manual_seed(3)
    out = checkpoint(_noisy, x)
    torch.rand(5)
    before = torch.get_rng_state()
    same(torch.autograd.grad(out.sum(), x), wanted)
    assert torch.equal(before, torch.get_rng_state())


@case("TestCheckpoint.test_checkpoint_not_preserve_rng_state_and_without_reentrant")
def generators_that_are_not_preserved(checkpoint: Checkpoint) -> None:
    """The replay draws what comes next."""
    x = leaf(50)
    out = checkpoint(_noisy, x, preserve_rng_state=False)
    before = torch.get_rng_state()
    out.sum().backward()
    assert not torch.equal(before, torch.get_rng_state())


@case("TestCheckpoint.test_get_device_states_recursive")
def devices_in_nested_arguments(checkpoint: Checkpoint) -> None:
    """Their generators count, too; here: meta, which has none, beside the CPU."""
    f = lambda held: F.dropout(held["x"][0].exp(), 0.5).sin()  # noqa: E731
    x = leaf(20)
    torch.manual_seed(3)
    wanted = gradients(_noisy, x)
    torch.manual_seed(3)
    same(gradients(lambda x: checkpoint(f, {"x": [x], "m": torch.ones(1, device="meta")}), x), wanted)


@case("TestCheckpoint.test_infer_device_state_recursive_meta")
def meta_tensors(checkpoint: Checkpoint) -> None:
    """A unit without values."""
    a = torch.ones(3, device="meta", requires_grad=True)
    checkpoint(lambda held: held[0].exp().sin(), [a]).sum().backward()
    assert a.grad is not None and a.grad.shape == (3,)


def _autocast(checkpoint: Checkpoint, backward_inside: bool, enabled: bool = True) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def run(call: Checkpoint) -> list[Tensor]:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = call(net, torch.ones(2, 8, requires_grad=True)).sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]

    same(run(checkpoint), run(lambda f, *a: f(*a)))


@case("TestAutograd.test_checkpointing_non_reentrant_autocast_cpu")
def autocast_around_forward(checkpoint: Checkpoint) -> None:
    """Is in force in the replay."""
    _autocast(checkpoint, False)


@case("TestAutograd.test_checkpointing_non_reentrant_autocast_cpu")
def autocast_around_both(checkpoint: Checkpoint) -> None:
    """Backward is called under it, too."""
    _autocast(checkpoint, True)


@case("TestAutograd.test_checkpointing_non_reentrant_autocast_cpu")
def autocast_off_around_forward(checkpoint: Checkpoint) -> None:
    """Is off in the replay."""
    _autocast(checkpoint, False, enabled=False)


@case("TestAutograd.test_checkpointing_without_reentrant_parameter_used_in_an_out")
def a_parameter_used_inside_and_outside(checkpoint: Checkpoint) -> None:
    """Both gradients add up, and its hook is called once."""
    w, calls = leaf(3, 3), []
    w.register_hook(lambda grad: calls.append(grad))
    x = leaf(2, 3)
    f = lambda x: (x @ w).sin().exp()  # noqa: E731
    (checkpoint(f, x * w[:2]) @ w).sum().backward()
    assert len(calls) == 1
    same(torch.autograd.grad((checkpoint(f, x) @ w).sum(), (x, w)), torch.autograd.grad((f(x) @ w).sum(), (x, w)))


@case("TestAutograd.test_checkpointing_without_reentrant_correct_grad")
def gradients_by_backward_and_by_grad(checkpoint: Checkpoint) -> None:
    """Both ways are the plain step's."""
    a, b = leaf(3), leaf(3)
    f = lambda a, b: (a * b).sin().exp()  # noqa: E731
    wanted = torch.autograd.grad(f(a, b).sum(), (a, b))
    checkpoint(f, a, b).sum().backward()
    same([a.grad, b.grad], wanted)
    same(torch.autograd.grad(checkpoint(f, a, b).sum(), (a, b)), wanted)


@case("TestAutograd.test_checkpointing_without_reentrant_custom_function_works")
def a_function_that_saves_inputs_and_outputs(checkpoint: Checkpoint) -> None:
    """A custom Function with several saved tensors."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            w = x * y * z
            ctx.save_for_backward(x, y, z, w)
            return w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, y, z, w = ctx.saved_tensors
            assert torch.equal(w, x * y * z)
            return grad * y * z, grad * x * z, grad * x * y

    x, y, z = leaf(3), leaf(3), leaf(3)
    f = lambda x, y, z: Product.apply(Product.apply(x, y, z).sin(), y, z)  # noqa: E731
    same(gradients(lambda *a: checkpoint(f, *a), x, y, z), gradients(f, x, y, z))


@case()
def hooks_around_the_call(checkpoint: Checkpoint) -> None:
    """They get the arguments, packed and unpacked."""
    packed: list[Tensor] = []
    x = leaf(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t * 1)[1], lambda t: t):
        out = checkpoint(lambda x: x.exp().sin(), x * 2)
    assert any(torch.equal(t, x * 2) for t in packed)
    out.sum().backward()
    same(x.grad, torch.autograd.grad((x * 2).exp().sin().sum(), x))


@case()
def hooks_inside_the_unit(checkpoint: Checkpoint) -> None:
    """They come first, in forward and in the replay."""

    def f(x: Tensor) -> Tensor:
        h = x.exp()
        with torch.autograd.graph.save_on_cpu():
            h = h.sin()
        return h.cos()

    x = leaf(3)
    same(gradients(lambda x: checkpoint(f, x), x), gradients(f, x))


@case()
def hooks_that_are_disabled(checkpoint: Checkpoint) -> None:
    """The context's own message."""

    def call() -> None:
        with torch.autograd.graph.disable_saved_tensors_hooks("hooks are off here"):
            checkpoint(lambda x: x.exp().sin(), leaf(3))

    raises(RuntimeError, "hooks are off here", call)


@case()
def units_under_vmap(checkpoint: Checkpoint) -> None:
    """As torch's own there: `torch.func.vmap` over a unit."""
    if hasattr(tc, "_NoopSaveInputs"):
        raise Skip("torch 2.11 refuses its checkpoint under vmap")
    x = torch.randn(2, 3)
    same(torch.func.vmap(lambda r: checkpoint(lambda t: t.exp().sin(), r))(x), x.exp().sin())


@case()
def units_in_forward_mode(checkpoint: Checkpoint) -> None:
    """`torch.func.jvp` over a unit."""
    if hasattr(tc, "_NoopSaveInputs"):
        raise Skip("torch 2.11 refuses its checkpoint in forward mode")
    x = torch.randn(3)
    f = lambda t: t.exp().sin()  # noqa: E731
    same(torch.func.jvp(lambda t: checkpoint(f, t), (x,), (x,)), torch.func.jvp(f, (x,), (x,)))


@case()
def units_in_several_threads(checkpoint: Checkpoint) -> None:
    """Each has its own generators' states and hooks."""
    found: dict[int, Any] = {}
    inputs = [leaf(3) for _ in range(4)]

    def train(n: int) -> None:
        found[n] = gradients(lambda x: checkpoint(lambda x: x.exp().sin(), x), inputs[n])

    threads = [threading.Thread(target=train, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for n, x in enumerate(inputs):
        same(found[n], gradients(lambda x: x.exp().sin(), x))


@case()
def views_written_in_place(checkpoint: Checkpoint) -> None:
    """What the unit made itself."""

    def f(x: Tensor) -> Tensor:
        h = x * 1
        h[0].mul_(2)
        h[1:].exp_()
        return h.sin()

    x = leaf(3)
    same(gradients(lambda x: checkpoint(f, x), x), gradients(f, x))


@case()
def second_derivatives(checkpoint: Checkpoint) -> None:
    """A gradient penalty."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def run(call: Checkpoint) -> list[Tensor]:
        x = torch.ones(2, 3, requires_grad=True)
        (g,) = torch.autograd.grad(call(net, x).sum(), x, create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), list(net.parameters())[:3]))

    same(run(checkpoint), run(lambda f, *a: f(*a)))


@case("CheckpointWrapperTest.test_checkpoint_wrapper_kwarg_support")
def the_wrapper_of_torch_distributed(checkpoint: Checkpoint) -> None:
    """With this checkpoint as its function; keywords, and the names of the module inside."""
    try:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    except ImportError as error:
        raise Skip("a torch without torch.distributed") from error

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, a: Tensor, *, b: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"out": (self.linear(a) * b.exp()).sin() * scale}

    net, a, b = Net(), leaf(2, 3), leaf(2, 3)
    wrapped = checkpoint_wrapper(net, checkpoint_fn=checkpoint)
    assert wrapped.linear is net.linear and set(wrapped.state_dict()) == set(net.state_dict())
    found = torch.autograd.grad(wrapped(a, b=b, scale=2.0)["out"].sum(), [a, b, *net.parameters()])
    same(found, torch.autograd.grad(net(a, b=b, scale=2.0)["out"].sum(), [a, b, *net.parameters()]))


@case("CheckpointWrapperTest.test_apply_activation_checkpointing")
def wrapping_the_blocks_of_a_model(checkpoint: Checkpoint) -> None:
    """All modules of a class."""
    try:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
            CheckpointWrapper,
            apply_activation_checkpointing,
            checkpoint_wrapper,
        )
    except ImportError as error:
        raise Skip("a torch without torch.distributed") from error
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 1))
    x = torch.ones(2, 3, requires_grad=True)
    wanted = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    wrap = lambda m: checkpoint_wrapper(m, checkpoint_fn=checkpoint)  # noqa: E731
    apply_activation_checkpointing(net, checkpoint_wrapper_fn=wrap, check_fn=lambda m: isinstance(m, nn.Linear))
    assert sum(isinstance(m, CheckpointWrapper) for m in net.modules()) == 3
    same(torch.autograd.grad(net(x).sum(), list(net.parameters())), wanted)


@case(row="BatchNorm statistics, counters, caches")
def batch_norm_counts_twice(checkpoint: Checkpoint) -> None:
    """torch's documents say that the forward runs twice, statistics included."""
    norm = nn.BatchNorm1d(3)
    checkpoint(nn.Sequential(norm, nn.Tanh()), leaf(4, 3)).sum().backward()
    assert int(norm.num_batches_tracked) == 2, "they are counted once"


@case()
def units_that_dynamo_does_not_enter(checkpoint: Checkpoint) -> None:
    """A unit called where Dynamo is disabled is the plain call's."""
    disabled = torch._dynamo.disable(lambda x: checkpoint(lambda t: t.exp().sin(), x))
    x = leaf(3)
    same(gradients(disabled, x), gradients(lambda x: x.exp().sin(), x))


@case(row="a `torch.Generator` of one's own")
def a_generator_of_ones_own(checkpoint: Checkpoint) -> None:
    """torch's replay draws from it again."""
    generator = torch.Generator().manual_seed(3)
    out = checkpoint(lambda x, g: (x * torch.rand(3, generator=g)).exp().sin(), leaf(3), generator)
    before = generator.get_state()
    out.sum().backward()
    assert not torch.equal(before, generator.get_state()), "the generator is where the forward left it"
