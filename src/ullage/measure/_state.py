"""Leave things as found: what a step changes, and the global generators."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from ullage._errors import CaptureError
from ullage._told import tells_of
from ullage.measure._snapshot import Snapshot
from ullage.measure._turns import one_at_a_time
from ullage.workload import Instance

P = ParamSpec("P")
R = TypeVar("R")


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
        saved = Snapshot(inst)
        saved.set_gradients_aside()
        try:
            yield saved
        finally:
            saved.restore()
