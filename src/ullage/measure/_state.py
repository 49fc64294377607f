"""Leave things as found: snapshot what a step changes, in host memory, and put it back."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from ullage._errors import CaptureError
from ullage._told import tells_of
from ullage.measure._reach import reach
from ullage.measure._turns import one_at_a_time
from ullage.workload import Instance

P = ParamSpec("P")
R = TypeVar("R")


class _Homes:
    """Memory in which tensors were, held weakly: a step that gives a tensor other memory (`.data =`) frees what nothing else holds."""

    def __init__(self) -> None:
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._again: dict[int, torch.UntypedStorage] = {}

    def note(self, tensor: Tensor) -> int:
        """A key of the memory that a tensor is in."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        self._alive.setdefault(key, weakref.ref(storage))
        return key

    def storage(self, key: int, nbytes: int, device: torch.device) -> torch.UntypedStorage:
        """That memory, or as much of new memory if it is gone: the same for all that were in it."""
        storage: torch.UntypedStorage | None = self._alive[key]() or self._again.get(key)
        if storage is None:
            storage = self._again[key] = torch.UntypedStorage(nbytes, device=device)
        elif hasattr(storage, "_fix_weakref"):
            storage._fix_weakref()
        return storage


@dataclass
class _TensorState:
    """A tensor: where its bytes were, what they were, its flag and its gradient."""

    tensor: Tensor
    homes: _Homes
    home: int
    home_bytes: int
    offset: int
    stride: tuple[int, ...]
    values: Tensor | None
    requires_grad: bool
    grad: Tensor | None

    @classmethod
    def of(cls, t: Tensor, homes: _Homes) -> _TensorState:
        # an expanded tensor can't be written to, by a step neither
        fixed = t.layout is not torch.strided or t.is_meta or torch._debug_has_internal_overlap(t) == 1
        grad = t.grad if t.is_leaf else None
        if fixed:
            return cls(t, homes, 0, 0, 0, (), None, t.requires_grad, grad)
        values = t.detach().to("cpu", copy=True)
        home, nbytes, offset = homes.note(t), t.untyped_storage().nbytes(), int(t.storage_offset())
        return cls(t, homes, home, nbytes, offset, t.stride(), values, t.requires_grad, grad)

    def restore(self) -> None:
        """Put it back, in place, so that whoever holds the tensor sees it."""
        t = self.tensor
        if self.values is not None:
            storage = self.homes.storage(self.home, self.home_bytes, t.device)
            data = torch.empty(0, dtype=self.values.dtype, device=t.device)
            data.set_(storage, self.offset, self.values.shape, self.stride)
            if t.data_ptr() != data.data_ptr() or t.shape != data.shape or t.stride() != data.stride():
                t.data = data
            data.copy_(self.values)
        if t.is_leaf:
            if t.requires_grad != self.requires_grad:
                t.requires_grad_(self.requires_grad)
            t.grad = self.grad


@dataclass
class Snapshot:
    """Tensors, gradients, attributes, containers, generators and RNG that a step of an instance can change."""

    tensors: list[_TensorState]
    attributes: list[tuple[Any, dict[str, Any]]]
    containers: list[tuple[Any, Any]]
    generators: list[tuple[torch.Generator, Tensor]]

    @property
    def grads(self) -> list[Tensor]:
        """The gradients that were there."""
        return [t.grad for t in self.tensors if t.grad is not None]

    def set_gradients_aside(self) -> None:
        """Steps start without gradients; those that were there come back with `restore`."""
        for t in self.tensors:
            if t.tensor.is_leaf:
                t.tensor.grad = None

    def let_go(self) -> None:
        """After a step: empty containers that the step has replaced by others and only this snapshot holds; `restore` refills them.

        `GradScaler.update` leaves the scaler with another dictionary, and the plain step would have freed what was in the first one.
        """
        ours = Counter(id(c) for c, _ in self.containers)
        held = [list(attributes.values()) for _, attributes in self.attributes]
        held += [list(was.values()) if isinstance(was, dict) else list(was) for _, was in self.containers]
        ours.update(id(v) for values in held for v in values)
        del held
        for container, _ in self.containers:
            if sys.getrefcount(container) == ours[id(container)] + 2:  # the loop's variable and the call's argument
                container.clear()

    def restore(self) -> None:
        """Put everything back, in place."""
        for owner, attributes in self.attributes:
            now = vars(owner)
            for name in set(now) - set(attributes):
                del now[name]
            now.update(attributes)
        for container, was in self.containers:
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(was)
        with torch.no_grad():
            for t in self.tensors:
                t.restore()
        for generator, state in self.generators:
            generator.set_state(state)


def snapshot(inst: Instance) -> Snapshot:
    """Take a snapshot; tensors are copied to host memory."""
    found, homes = reach(inst), _Homes()
    return Snapshot(
        [_TensorState.of(t, homes) for t in found.tensors],
        [(o, dict(vars(o))) for o in found.objects],
        [(c, copy.copy(c)) for c in found.containers],
        [(g, g.get_state()) for g in found.generators],
    )


@contextlib.contextmanager
def preserved_torch_rng() -> Iterator[None]:
    """Put back torch's global generators, of every device."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put back the global generators of torch (every device), Python and numpy."""
    python, numpy = random.getstate(), np.random.get_state()
    with preserved_torch_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def unless_seeded() -> Iterator[None]:
    """Put torch's generators back if they were seeded meanwhile: a factory does that, and draws of other threads do not."""
    found = [(g, g.initial_seed(), g.get_state()) for g in _default_generators()]
    try:
        yield
    finally:
        for generator, seed, state in found:
            now = generator.get_state()
            fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed()).get_state()
            if not torch.equal(now, state) and (generator.initial_seed() != seed or torch.equal(now, fresh)):
                generator.set_state(state)


def _default_generators() -> list[torch.Generator]:
    ready = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.default_generator, *(torch.cuda.default_generators if ready else ())]


def captures(call: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that works on fake tensors: one at a time, and draws of other threads are left alone."""

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        progress: Any = kwargs.get("progress")
        with one_at_a_time(progress if callable(progress) else None):
            return call(*args, **kwargs)

    return tells_of(CaptureError)(wrapped)  # type: ignore[no-any-return]


def leaves_rng(call: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that runs real steps: one at a time, and every global generator is left as found."""

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        progress: Any = kwargs.get("progress")
        with one_at_a_time(progress if callable(progress) else None), preserved_rng():
            return call(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def preserved(inst: Instance) -> Iterator[Snapshot]:
    """Snapshot now, restore at the end whatever happens. Gradients are set aside meanwhile."""
    with preserved_rng():
        saved = snapshot(inst)
        saved.set_gradients_aside()
        try:
            yield saved
        finally:
            saved.restore()
