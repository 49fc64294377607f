"""Dynamo keeps off the runtime's own code: its hooks and modes run where compiled code runs, and are not to be compiled.

Marking code costs nothing when it runs, `torch._dynamo.disable` costs microseconds at every saved tensor.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator

from torch._C._dynamo import eval_frame


def keep_eager(modules: Iterable[types.ModuleType]) -> None:
    """Mark all functions and methods of these modules; what they call (a unit's own forward) is compiled as ever."""
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    for module in modules:
        for owner in (module, *[c for c in vars(module).values() if isinstance(c, type)]):
            for value in list(vars(owner).values()):
                function = getattr(value, "__wrapped__", getattr(value, "__func__", value))
                if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                    for code in _with_inner(function.__code__):
                        eval_frame.set_code_exec_strategy(code, skip)


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _with_inner(inner)
