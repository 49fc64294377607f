"""Note which modules of a model were in evaluation mode in a step: dropout and statistics take memory."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping

from torch import nn

_MOST_NAMED = 3


def in_evaluation(model: nn.Module, called: Mapping[str, bool]) -> list[str]:
    """Names of modules that were in evaluation mode, of those whose code reads the mode.

    Args:
        model: the model after a step.
        called: by name, the mode that a module was in when it was called; a step may change modes on its way.
    """
    return [n for n, m in model.named_modules() if not called.get(n, m.training) and reads_mode(type(m))]


def note_of(evaluation: Collection[str]) -> list[str]:
    """A plan's or profile's note about them."""
    if not evaluation:
        return []
    return [
        f"{named(list(evaluation))} {'was' if len(evaluation) == 1 else 'were'} in evaluation mode and planned so; "
        "if the model trains in training mode, call model.train() and plan again"
    ]


def named(names: list[str]) -> str:
    """The first of them, and how many more."""
    first = ", ".join(n or "the root" for n in names[:_MOST_NAMED])
    more = len(names) - _MOST_NAMED
    return f"{first} and {more} more modules" if more > 0 else first


def reads_mode(kind: type) -> bool:
    """Does code of this class load `training`?"""
    functions = (f for base in kind.__mro__ if base is not nn.Module for f in vars(base).values())
    return any(_loads_training(f.__code__) for f in functions if isinstance(f, types.FunctionType))


def _loads_training(code: types.CodeType) -> bool:
    return "training" in code.co_names or any(
        _loads_training(c) for c in code.co_consts if isinstance(c, types.CodeType)
    )
