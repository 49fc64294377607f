"""The ops of random programs by name, and how often each is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from tests.runtime.program_arithmetic import (
    Made,
    attention,
    binary,
    cat,
    linear,
    matmul,
    norm,
    parts,
    reduce,
    residual,
    softmax,
    unary,
    view,
)
from tests.runtime.program_constructs import bits, grows, kinds, restored, swapped, toggled
from tests.runtime.program_effects import apart, branch, custom, draws, in_place, lookup, state

if TYPE_CHECKING:
    from tests.runtime.program_units import Unit

_PLAIN = (
    unary, binary, linear, matmul, residual, norm, view, parts, cat, in_place, draws, attention, softmax, reduce, lookup,
    branch, apart, custom, state,
)  # fmt: skip
_MORE = (grows, toggled, restored, swapped, bits, kinds)


class OPS:
    """The ops by name. An attribute of a class: no unit reaches the ops that it does not run."""

    named: ClassVar[dict[str, Callable[[Unit, int, Tensor, Tensor, int], Made]]] = {
        f.__name__: f for f in (*_PLAIN, *_MORE)
    }


_OFTEN = (
    ["unary"] * 4
    + ["binary"] * 3
    + ["linear"] * 4
    + ["matmul"] * 2
    + ["residual"] * 2
    + ["norm"] * 2
    + ["view"] * 3
    + ["in_place"] * 2
)
# the order is part of what a seed means
NAMES = [*_OFTEN, *(f.__name__ for f in _PLAIN if f.__name__ not in _OFTEN)]
MORE_NAMES = [f.__name__ for f in _MORE]
