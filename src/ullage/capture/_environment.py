"""Patches around a step on fake tensors, without which code of torch or of libraries would notice that they are fake.

Each patch names the code that would take another branch. All are undone on exit.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.optim.optimizer as optim
from torch import Tensor

from ullage._errors import CaptureError
from ullage._torch import FakeTensor, Missing, disable_modes, foreach_types, recurrent, recurrent_module
from ullage.capture._host_rng import own_host_rng
from ullage.capture._op_values import NUMPY
from ullage.capture._recurrent import Pack, dense_lstm, packed, padded, takes_onednn
from ullage.measure._state import unless_seeded
from ullage.measure._turns import one_at_a_time
from ullage.runtime import rng_states_from


def _one_hot(values: Any, index: Tensor, classes: int) -> Tensor:
    """Run the ops of `at::one_hot` on a CPU: a check of the range, zeros, a scatter (aten/native/Onehot.cpp)."""
    low, high = torch.aminmax(index)
    if (
        classes < 0 or values.get(high) is not None or values.assumed.taking.recording is not None
    ):  # the check needs values: without them it is skipped
        low.item()
        largest = int(high.item())
        classes = classes if classes >= 0 else largest + 1
    return torch.zeros(*index.shape, classes, dtype=index.dtype).scatter_(-1, index.unsqueeze(-1), 1)


def _here() -> Callable[[], bool]:
    """Return a function that says whether the thread that calls it is this one."""
    owner = threading.get_ident()
    return lambda: threading.get_ident() == owner


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextlib.contextmanager
def unnoticed(tracker: Any) -> Iterator[None]:
    """Patch code that would notice fake tensors, for the time of a capture, and put generators back after it.

    The whole process sees the patches. So only one capture runs at a time, and each patch calls the original in other threads.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_at_a_time())
        _fix_generators(stack, tracker)
        _watch_optimizers(stack, tracker)
        _choose_kernels(stack, tracker)
        _read_values(stack, tracker)
        _let_tensors_be_swapped(stack, tracker)
        hf = sys.modules.get("transformers.utils.import_utils")
        if hf is not None and hasattr(hf, "is_fake_tensor"):  # is_tracing() asks it and then builds masks
            is_fake, mine = hf.is_fake_tensor, _here()
            stack.enter_context(_patched(hf, "is_fake_tensor", lambda x: False if mine() else is_fake(x)))
        yield


class _Default:
    """Stands in for torch's default generator: the tracker's in the thread that captures, torch's own in all others.

    A capture never moves torch's own.
    """

    def __init__(self, tracker: Any) -> None:
        self._real, self._tracker, self._mine = torch.default_generator, tracker, _here()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker.generators.default if self._mine() else self._real, name)

    def get_state(self) -> Tensor:
        if not self._mine():
            return self._real.get_state()
        state: Tensor = self._tracker.generators.default.get_state()
        self._tracker.adopt_between_ops(state)
        return state

    def manual_seed(self, seed: int) -> torch.Generator:
        (self._tracker.generators.default if self._mine() else self._real).manual_seed(seed)
        return self._real  # as torch does: `generator=torch.manual_seed(0)` passes the default generator


def _fix_generators(stack: contextlib.ExitStack, tracker: Any) -> None:
    """Make draws that steer a step the same every time, and leave the user's generators where they are.

    Fake kernels draw nothing. Python code of this thread draws from generators of its own instead of torch's, Python's and numpy's.
    """
    stack.callback(tracker.generators.put_back)
    stack.enter_context(unless_seeded())
    stack.enter_context(own_host_rng(0))
    tracker.generators.default.manual_seed(0)
    default = _Default(tracker)
    stack.enter_context(_patched(torch.random, "default_generator", default))
    # checkpointing keeps generators' states per unit in a real step, too: they count
    stack.enter_context(
        rng_states_from(default.get_state, tracker.generators.default.set_state, tracker.adopt_between_ops)
    )


def _watch_optimizers(stack: contextlib.ExitStack, tracker: Any) -> None:
    """Mark ops of an optimizer's step as such, and refuse an optimizer that would step real parameters."""

    def in_forward(closure: Any) -> Any:
        """Mark a closure as forward: `step(closure)` runs forward and backward inside the optimizer's step."""
        if not isinstance(closure, types.FunctionType | types.MethodType | functools.partial):
            return closure

        def run() -> Any:
            tracker.phase = "forward"
            try:
                return closure()
            finally:
                tracker.phase = "optimizer"

        return run

    mine = _here()

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> Any:
        if not mine():
            return None
        foreach_types()  # raises if this torch has no such list: the optimizer would take its other implementation
        tracker.phase = "optimizer"
        for group in optimizer.param_groups:
            if any(not isinstance(p, FakeTensor) for p in group["params"]):
                raise CaptureError(
                    "step: an optimizer that is reached in a way that can't be copied would have stepped the real "
                    "parameters; pass it by argument, closure or functools.partial, or use Workload.from_factory"
                )
        return tuple(map(in_forward, args)), {k: in_forward(v) for k, v in kwargs.items()}

    def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        if mine():
            tracker.phase = "forward"

    # torch.optim asks `type(p) in _foreach_supported_types` to choose between its foreach and its loop implementation
    if not isinstance(foreach_types, Missing):
        stack.enter_context(_patched(optim, "_foreach_supported_types", [*foreach_types(), FakeTensor]))
    stack.callback(optim.register_optimizer_step_pre_hook(before_step).remove)
    stack.callback(optim.register_optimizer_step_post_hook(after_step).remove)


def _choose_kernels(stack: contextlib.ExitStack, tracker: Any) -> None:
    """Run the ops of real tensors where C++ chooses by the backend, which is Meta for a fake tensor."""
    one_hot, mine = torch.nn.functional.one_hot, _here()

    def choose_one_hot(tensor: Tensor, num_classes: int = -1) -> Any:
        fits = mine() and isinstance(tensor, FakeTensor) and tensor.device.type == "cpu" and tensor.numel() > 0
        return _one_hot(tracker.kernels.values, tensor, num_classes) if fits else one_hot(tensor, num_classes)

    def choose_lstm(*args: Any) -> Any:
        """Run oneDNN's ops if real tensors would: the other implementation unrolls over time."""
        ours = mine() and len(args) == 9 and isinstance(args[0], FakeTensor)
        return dense_lstm(*args) if ours and takes_onednn(*args[:4]) else recurrent["lstm"](*args)

    stack.enter_context(_patched(torch.nn.functional, "one_hot", choose_one_hot))
    gone = next((f for f in recurrent.values() if isinstance(f, Missing)), None)
    # without these functions a recurrent layer would be captured with other ops than it really runs
    if gone is not None:

        def refuse(module: Any, _: Any) -> None:
            if isinstance(module, torch.nn.RNNBase) and mine():
                gone()

        stack.callback(torch.nn.modules.module.register_module_forward_pre_hook(refuse).remove)
        return
    stack.enter_context(_patched(recurrent_module, "lstm", choose_lstm))
    runs: dict[str, Callable[..., Any]] = {k: functools.partial(packed, k) for k in _RECURRENT}
    runs |= {"_pack_padded_sequence": Pack.apply, "_pad_packed_sequence": padded}
    for name, run in runs.items():
        stack.enter_context(_patched(recurrent_module, name, _for_packed(getattr(recurrent_module, name), run, mine)))


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _for_packed(plain: Callable[..., Any], run: Callable[..., Any], mine: Callable[[], bool]) -> Callable[..., Any]:
    def chosen(*args: Any) -> Any:
        # the lengths of packed sequences; a dense layer passes its hidden state here
        lengths = args[1] if len(args) > 1 else None
        is_packed = isinstance(lengths, FakeTensor) and lengths.dim() == 1 and not lengths.is_floating_point()
        return run(*args) if is_packed and mine() else plain(*args)

    return chosen


def _read_values(stack: contextlib.ExitStack, tracker: Any) -> None:
    """Serve `f"{loss:.3f}"` and `.numpy()`, which ask in Python and C++ whether a tensor is a plain one, and then for its values."""
    mine, values = _here(), tracker.kernels.values

    def written(tensor: FakeTensor, spec: str) -> str:
        if mine() and tensor.dim() == 0:
            return tensor.item().__format__(spec)
        return object.__format__(tensor, spec)

    def numpy(tensor: FakeTensor, *, force: bool = False) -> Any:
        if not mine():
            return Tensor.numpy(tensor, force=force)
        if not force and (tensor.requires_grad or tensor.device.type != "cpu"):  # as torch refuses a real one
            wants = "grad" if tensor.requires_grad else f"device {tensor.device}"
            raise RuntimeError(
                f"Can't call numpy() on Tensor that requires {wants}. Use tensor.detach().cpu().numpy() instead."
            )
        with disable_modes():
            known = values.get(tensor)
            taken = values.assumed.recorded(NUMPY, tracker.place, known=known is not None)
            if taken is not None and taken.value.shape == tuple(tensor.shape):
                return taken.value.copy()
            return values.assumed.array(tensor, tracker.place()) if known is None else known.clone().numpy()

    for name, value in (("__format__", written), ("numpy", numpy)):
        stack.enter_context(_added(FakeTensor, name, value))


@contextlib.contextmanager
def _added(owner: type, name: str, value: Any) -> Iterator[None]:
    """Give a class an attribute of its own that it otherwise inherits."""
    assert name not in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def _let_tensors_be_swapped(stack: contextlib.ExitStack, tracker: Any) -> None:
    """Let `Module.to` swap a parameter, which torch refuses while a weak reference points to it.

    The fake mode has such references, in a dictionary of the tensors that its kernels have made. Nothing looks these up again.
    """
    swap, mine = torch.utils.swap_tensors, _here()
    memo = getattr(tracker.kernels.fake_mode.fake_tensor_converter, "tensor_memo", {})

    def forget_and_swap(first: Tensor, second: Tensor) -> None:
        if mine():
            for key in [getattr(r, "key", None) for t in (first, second) for r in weakref.getweakrefs(t)]:
                memo.pop(key, None)
        swap(first, second)

    stack.enter_context(_patched(torch.utils, "swap_tensors", forget_and_swap))
