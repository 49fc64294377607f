"""Keep Dynamo from compiling the runtime's own hooks and modes, which run in the middle of compiled code.

A mark on the code objects costs nothing at run time; `torch._dynamo.disable` would cost microseconds at every saved tensor.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator

from ullage._torch import Missing, frame_action, frame_strategy, set_frame_strategy

_GONE = [n for n in (frame_action, frame_strategy, set_frame_strategy) if isinstance(n, Missing)]


def keep_eager(modules: Iterable[types.ModuleType]) -> None:
    """Mark all functions and methods of these modules; Dynamo still compiles what they call (a unit's own forward)."""
    if _GONE:  # `check` raises once a compiled unit runs
        return
    skip = frame_strategy(frame_action.SKIP, frame_action.DEFAULT)
    for module in modules:
        for owner in (module, *[c for c in vars(module).values() if isinstance(c, type)]):
            for value in list(vars(owner).values()):
                function = getattr(value, "__wrapped__", getattr(value, "__func__", value))
                if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                    for code in _with_inner(function.__code__):
                        set_frame_strategy(code, skip)


def check(is_compiled: Callable[[], bool]) -> None:
    """Raise UnsupportedTorch for a compiled unit if this torch has no way to keep Dynamo from the hooks around it."""
    if _GONE and is_compiled():
        _GONE[0]()


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _with_inner(inner)
