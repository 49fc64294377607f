"""What is found of a function that is not the same twice, and the debug mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint as tc
from torch import Tensor

from tests.runtime.torch_cases._case import Checkpoint, Unseen, case, leaf, raises, same

_calls = Unseen()
Unary = Callable[[Tensor], Tensor]


def _changing(first: Unary, later: Unary) -> Unary:
    """A function that is another one from its second call on, for no reason that a library can see."""
    _calls.items.clear()

    def f(x: Tensor) -> Tensor:
        _calls.items.append(1)
        return first(x) if len(_calls.items) == 1 else later(x)

    return f


def _three(x: Tensor) -> Tensor:
    return x.sin().exp().sin()


def _two(x: Tensor) -> Tensor:
    return x.sin().exp()


def _other_shape(x: Tensor) -> Tensor:
    return x.sin() * torch.ones(2)


def _backward(checkpoint: Checkpoint, first: Unary, later: Unary, **options: Any) -> Callable[[], None]:
    return lambda: checkpoint(_changing(first, later), leaf(1), **options).sum().backward()


FINDS = "TestAutograd.test_checkpoint_detects_non_determinism"


@case(FINDS)
def fewer_tensors_in_the_replay(checkpoint: Checkpoint) -> None:
    """A CheckpointError."""
    raises(tc.CheckpointError, "saved", _backward(checkpoint, _three, _two))


@case(FINDS)
def more_tensors_in_the_replay_stopped_early(checkpoint: Checkpoint) -> None:
    """What was asked for is there before they part: no error."""
    _backward(checkpoint, _two, _three)()


@case(FINDS)
def more_tensors_in_a_replay_run_to_its_end(checkpoint: Checkpoint) -> None:
    """A CheckpointError."""
    with tc.set_checkpoint_early_stop(False):
        raises(tc.CheckpointError, "more", _backward(checkpoint, _two, _three))


@case(FINDS)
def other_shapes_in_the_replay(checkpoint: Checkpoint) -> None:
    """A CheckpointError."""
    raises(tc.CheckpointError, "", _backward(checkpoint, _two, _other_shape))


@case()
def other_dtypes_in_the_replay(checkpoint: Checkpoint) -> None:
    """A CheckpointError."""
    later: Unary = lambda x: x.sin().double().exp()  # noqa: E731
    raises(tc.CheckpointError, "float64", _backward(checkpoint, _two, later))


@case(FINDS)
def an_error_of_checkpointing_is_a_runtime_error(checkpoint: Checkpoint) -> None:
    """So that old handlers catch it."""
    raises(RuntimeError, "", _backward(checkpoint, _three, _two))


@case()
def unchecked_shapes(checkpoint: Checkpoint) -> None:
    """`determinism_check="none"` lets another shape through."""
    _backward(checkpoint, lambda x: x.sin() * torch.ones(1), _other_shape, determinism_check="none")()


@case()
def unchecked_but_fewer(checkpoint: Checkpoint) -> None:
    """What is not there can't be had."""
    raises(tc.CheckpointError, "saved", _backward(checkpoint, _three, _two, determinism_check="none"))


@case(row='`determinism_check="none"`, and the replay saves more')
def unchecked_but_more(checkpoint: Checkpoint) -> None:
    """Run to its end."""
    later = _backward(checkpoint, _two, _three, determinism_check="none", early_stop=False)
    raises(tc.CheckpointError, "more", later)


@case()
def a_check_that_is_none(checkpoint: Checkpoint) -> None:
    """A ValueError that names the values."""
    raises(ValueError, "none", lambda: checkpoint(_two, leaf(1), determinism_check="sometimes"))


DEBUG = FINDS


@case(DEBUG)
def the_message_tells_of_debug(checkpoint: Checkpoint) -> None:
    """How to see more."""
    raises(tc.CheckpointError, "debug=True", _backward(checkpoint, _three, _two))


@case(DEBUG)
def debug_shows_the_ops(checkpoint: Checkpoint) -> None:
    """Of forward and replay."""
    raises(tc.CheckpointError, "aten.exp.default", _backward(checkpoint, _two, _other_shape, debug=True))


@case(DEBUG)
def debug_by_context(checkpoint: Checkpoint) -> None:
    """It has precedence over the argument, both ways."""
    with tc.set_checkpoint_debug_enabled(True):
        raises(tc.CheckpointError, "aten.exp.default", _backward(checkpoint, _two, _other_shape, debug=False))
    with tc.set_checkpoint_debug_enabled(False):
        error = raises(tc.CheckpointError, "", _backward(checkpoint, _two, _other_shape, debug=True))
    assert "aten.exp.default" not in str(error)


@case()
def debug_changes_no_gradient(checkpoint: Checkpoint) -> None:
    """Of a function that is the same twice."""
    x = leaf(3)
    checkpoint(_three, x, debug=True).sum().backward()
    same(x.grad, torch.autograd.grad(_three(x).sum(), x))


@case()
def debug_and_contexts_of_ones_own(checkpoint: Checkpoint) -> None:
    """Refused together."""
    from contextlib import nullcontext

    contexts = lambda: (nullcontext(), nullcontext())  # noqa: E731
    raises(ValueError, "debug", lambda: checkpoint(_two, leaf(1), debug=True, context_fn=contexts))
    with tc.set_checkpoint_debug_enabled(True):
        raises(ValueError, "debug", lambda: checkpoint(_two, leaf(1), context_fn=contexts))


@case(FINDS, row="global or `__slots__` that the unit's code writes")
def a_counter_in_a_closure(checkpoint: Checkpoint) -> None:
    """A function that counts its own calls, and does something else at the second."""
    calls = [0]

    def f(x: Tensor) -> Tensor:
        calls[0] += 1
        return _three(x) if calls[0] == 1 else _two(x)

    raises(tc.CheckpointError, "saved", lambda: checkpoint(f, leaf(1)).sum().backward())
