"""`debug=True`: note the ops of forward and replay, so that an error can show the first that differs."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from ullage._source import source_line
from ullage._torch import TorchDispatchMode
from ullage.runtime.ambient._local import local
from ullage.runtime.ops._log import is_query
from ullage.runtime.tensors import _sparse as sparse


class OpNames(TorchDispatchMode):
    """Appends `op at file:line` to a list."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Ignore what Dynamo runs to compile. Without this it compiles nothing under the mode, and `torch.cond` needs it to."""
        return True

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (local.quiet or is_query(func)):
            self.names.append(f"{func} at {source_line()}")
        return sparse.run(func, args, kwargs)


def first_difference(forward: list[str], replay: list[str]) -> str:
    """Say where two lists of ops first differ, with a few ops before it."""
    for n, (a, b) in enumerate(zip_longest(forward, replay, fillvalue="(end)")):
        if a.split(" at ")[0] != b.split(" at ")[0] and b != "(end)":
            before = "".join(f"\n    {op}" for op in forward[max(n - 3, 0) : n])
            return f"\n  ops agree up to number {n}:{before}\n  forward: {a}\n  replay:  {b}"
    return "\n  the ops of forward and replay are the same as far as the replay went"
