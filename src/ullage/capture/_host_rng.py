"""Give one thread its own stand-ins for Python's and numpy's global generators, for the time of a step.

Draws of this thread through `random` and `numpy.random` come from generators of its own. The global ones, which other threads
use, stay where they are. A method bound earlier (`from random import random`) still draws from a global one.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_PYTHON = getattr(random, "_inst", None)
_NUMPY = getattr(np.random.mtrand, "_rand", None)
_NAMES = {
    "seed": "seed",
    "ranf": "random_sample",
    "sample": "random_sample",
}  # numpy's functions that are no bound methods


@contextlib.contextmanager
def own_host_rng(seed: int) -> Iterator[None]:
    """Draw from this thread's own, seeded generators.

    In a process with one thread the global ones are seeded, too, and put back. With several threads they are left to the others.
    """
    alone = threading.active_count() == 1
    mine, its = random.Random(seed), np.random.RandomState(seed)
    python, numpy = random.getstate(), np.random.get_state()
    if alone:
        random.seed(seed)
        np.random.seed(seed)
    try:
        with contextlib.ExitStack() as stack:
            _redirect(stack, random, _PYTHON, mine)
            _redirect(stack, np.random, _NUMPY, its)
            yield
    finally:
        if alone:
            random.setstate(python)
            np.random.set_state(numpy)


def _redirect(stack: contextlib.ExitStack, module: Any, shared: Any, own: Any) -> None:
    """Make a module's functions that draw from `shared` draw from `own`, in this thread."""
    owner = threading.get_ident()

    def chosen(plain: Callable[..., Any], mine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return (mine if threading.get_ident() == owner else plain)(*args, **kwargs)

        return call

    for name, plain in list(vars(module).items()):
        mine = getattr(own, _NAMES.get(name, name) if module is np.random else name, None)
        if mine is not None and (
            getattr(plain, "__self__", None) is shared or (module is np.random and name in _NAMES)
        ):
            setattr(module, name, chosen(plain, mine))
            stack.callback(setattr, module, name, plain)
