"""When a replay ends, which way that is set, and what it frees."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
import torch.utils.checkpoint as tc
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runtime.torch_cases._case import Checkpoint, Skip, Unseen, case, leaf, raises, same

aten = torch.ops.aten


class Count(TorchDispatchMode):
    """Counts calls of one op."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


def _clones(checkpoint: Checkpoint, **options: Any) -> int:
    """How often a clone that is of no use to the replay runs, forward included."""
    with Count(aten.clone.default) as count:
        out = checkpoint(lambda x: x.sin().cos().clone(), leaf(), **options)
    with count:
        out.backward()
    return count.calls


SET = "TestNestedCheckpoint.test_nested_checkpoint_set_early_stop"


@case(SET)
def a_replay_stops_early(checkpoint: Checkpoint) -> None:
    """What comes after the last saved tensor does not run again."""
    assert _clones(checkpoint) == 1


@case(SET)
def early_stop_by_argument(checkpoint: Checkpoint) -> None:
    """Both ways."""
    assert (_clones(checkpoint, early_stop=False), _clones(checkpoint, early_stop=True)) == (2, 1)


@case(SET)
def early_stop_by_context(checkpoint: Checkpoint) -> None:
    """Both ways; it counts where forward is called."""
    for enabled, calls in ((False, 2), (True, 1)):
        with Count(aten.clone.default) as count:
            with tc.set_checkpoint_early_stop(enabled):
                out = checkpoint(lambda x: x.sin().cos().clone(), leaf())
            out.backward()
        assert count.calls == calls


@case(SET)
def the_inner_context_counts(checkpoint: Checkpoint) -> None:
    """Contexts in contexts."""
    with tc.set_checkpoint_early_stop(False), tc.set_checkpoint_early_stop(True):
        assert _clones(checkpoint) == 1


@case(SET)
def the_context_has_precedence(checkpoint: Checkpoint) -> None:
    """Over the argument."""
    with tc.set_checkpoint_early_stop(False):
        assert _clones(checkpoint, early_stop=True) == 2
    with tc.set_checkpoint_early_stop(True):
        assert _clones(checkpoint, early_stop=False) == 1


NOTHING = "TestNestedCheckpoint.test_nested_checkpoint_set_early_stop_no_recompution_needed"


@case(NOTHING)
def only_its_input_is_saved(checkpoint: Checkpoint) -> None:
    """The function is called, the kernel is not."""
    for early_stop, calls in ((True, 1), (False, 2)):
        with Count(aten.sin.default) as count:
            out = checkpoint(torch.sin, leaf(), early_stop=early_stop)
            out.backward()
        assert count.calls == calls


@case(NOTHING)
def nothing_is_saved(checkpoint: Checkpoint) -> None:
    """Then nothing runs again."""
    for early_stop in (True, False):
        with Count(aten.clone.default) as count:
            checkpoint(torch.clone, leaf(), early_stop=early_stop).backward()
        assert count.calls == 1


@case("TestCheckpoint.test_checkpointing_without_reentrant_early_free")
def what_is_rebuilt_is_freed_node_by_node(checkpoint: Checkpoint) -> None:
    """Backward of one node frees what only it needed, with `retain_graph=True` too."""
    alive = Unseen()

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            made = x.detach() * 2
            alive.items.append(weakref.ref(made))
            ctx.save_for_backward(made)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            ctx.saved_tensors  # noqa: B018
            seen.append(sum(r() is not None for r in alive.items))
            return grad

    def f(x: Tensor) -> Tensor:
        for _ in range(3):
            x = Saves.apply(x)
        return x

    for retain in (False, True):
        seen: list[int] = []
        alive.items.clear()
        gc.disable()
        try:
            out = checkpoint(f, leaf(4))
            out.sum().backward(retain_graph=retain)
        finally:
            gc.enable()
        assert seen == sorted(seen, reverse=True) and seen[0] > seen[-1], seen


@case("TestAutograd.test_checkpointing_without_reentrant_memory_savings")
def forward_holds_less(checkpoint: Checkpoint) -> None:
    """A chain of blocks leaves only their inputs."""
    net = nn.ModuleList([nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(3)])

    def held(call: Checkpoint) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            x = leaf(16, 8)
            for block in net:
                x = call(block, x)
        return sum(sizes)

    assert held(checkpoint) < held(lambda f, *a: f(*a)) / 4


@case(
    "TestAutograd.test_checkpointing_without_reentrant_custom_function_works",
    row="saved tensors that a `Function`'s backward reads twice",
)
def a_function_reads_its_saved_tensors_twice(checkpoint: Checkpoint) -> None:
    """torch asks to read them once, and says so."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            out = x.exp()
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0] * (ctx.saved_tensors[0] / ctx.saved_tensors[0])

    out = checkpoint(lambda x: Twice.apply(x).sum(), leaf(3))
    raises(RuntimeError, "unpacked once", out.backward)


@case("TestAutograd.test_access_saved_tensor_twice_without_recomputation_works")
def an_attribute_of_a_node_is_read_between(checkpoint: Checkpoint) -> None:
    """Looking at saved tensors before backward rebuilds them each time; after it they are gone."""
    x = leaf(3)
    with Count(aten.exp.default) as count:
        out = checkpoint(lambda x: x.exp(), x)
        for calls in (2, 3):
            same(out.grad_fn._saved_result, out)
            assert count.calls == calls
        out.sum().backward()
        assert count.calls == 4
    same(x.grad, out)
    raises(RuntimeError, "after they have already been freed", lambda: out.grad_fn._saved_result)


@case("TestAutograd.test_checkpoint_valid_reset_on_error")
def an_error_in_backward_leaves_nothing_behind(checkpoint: Checkpoint) -> None:
    """The next backward is as ever."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ValueError("of the backward")

    x = leaf(3)
    raises(ValueError, "of the backward", checkpoint(lambda x: Fails.apply(x.exp()).sin(), x).sum().backward)
    x.grad = None
    checkpoint(lambda x: x.exp().sin(), x).sum().backward()
    same(x.grad, x.exp().cos() * x.exp())


_again = Unseen()


@case()
def an_error_in_the_replay_comes_out_as_it_is(checkpoint: Checkpoint) -> None:
    """And the unit can be called again."""
    _again.items.clear()

    def f(x: Tensor) -> Tensor:
        h = x.exp()
        _again.items.append(1)
        if len(_again.items) == 2:
            raise KeyError("of the replay")
        return h.sin()

    x = leaf(3)
    raises(KeyError, "of the replay", checkpoint(f, x).sum().backward)
    checkpoint(f, x).sum().backward()
    same(x.grad, x.exp().cos() * x.exp())


@case("TestAutograd.test_checkpoint_graph_execution_group")
def backwards_in_one_group_share_a_replay(checkpoint: Checkpoint) -> None:
    """Over disjoint parts of the unit's graph."""
    if not hasattr(tc, "GraphExecGroup"):
        raise Skip("this torch has no GraphExecGroup")

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.items.append(1)
        y = x.sin().cos()
        return y, y.sin().cos()

    x = leaf(3, 3)
    (wanted,) = torch.autograd.grad(x.sin().cos().sin().cos().sum(), x)
    calls = Unseen()
    for group, times in ((True, 2), (False, 3)):
        calls.items.clear()
        y, z = checkpoint(f, x)
        with tc.GraphExecGroup() if group else torch.enable_grad():
            (of_y,) = torch.autograd.grad(z.sum(), y)
            same(torch.autograd.grad(y, x, of_y), [wanted])
        assert len(calls.items) == times


@case("TestAutograd.test_checkpoint_graph_execution_group")
def backwards_in_one_group_must_not_overlap(checkpoint: Checkpoint) -> None:
    """An error that names the group."""
    if not hasattr(tc, "GraphExecGroup"):
        raise Skip("this torch has no GraphExecGroup")
    out = checkpoint(lambda x: x.sin().cos().sum(), leaf(3))
    with tc.GraphExecGroup():
        out.backward(retain_graph=True)
        raises(tc.CheckpointError, "GraphExecGroup", lambda: out.backward(retain_graph=True))


@case("TestAutograd.test_checkpoint_graph_execution_group")
def groups_are_not_nested(checkpoint: Checkpoint) -> None:
    """torch's own check; it holds with units of either kind inside."""
    if not hasattr(tc, "GraphExecGroup"):
        raise Skip("this torch has no GraphExecGroup")

    def nested() -> None:
        with tc.GraphExecGroup():
            checkpoint(lambda x: x.sin().cos().sum(), leaf(3)).backward()
            with tc.GraphExecGroup():
                pass

    raises(RuntimeError, "cannot be nested", nested)
