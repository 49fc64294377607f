"""Which way a condition goes that has no value: the one that does not raise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ullage.capture._checks import value_that_passes

ASKED: list[bool | None] = []
CODE = {
    "if x: raise ValueError": False,
    "if not x: raise ValueError(f'{1 + 1} of {[2]}')": True,
    "assert x, 'why'": True,
    "assert not x": False,
    "if x.item(): raise ValueError": False,
    "if not x.item():\n  if y: raise ValueError": None,
    "if y or x: raise ValueError": False,
    "if y and not x: raise ValueError": True,
    "if x: return 1": None,
    "z = bool(x)": None,
    "return not x": None,
    "while x: raise ValueError": False,
    "if x:\n  return 1\nraise ValueError": True,
}


class _Asks:
    def __bool__(self) -> bool:
        ASKED.append(value_that_passes(sys._getframe(1)))
        return True

    item = __bool__


@pytest.mark.parametrize("code", CODE)
def test_the_way_that_does_not_raise(code: str) -> None:
    lines = "\n".join("  " + line for line in code.splitlines())
    scope: dict[str, Any] = {}
    exec(compile(f"def f(x, y):\n{lines}\n", f"{__file__}/text", "exec"), scope)
    f: Callable[..., Any] = scope["f"]
    ASKED.clear()
    with contextlib.suppress(ValueError, AssertionError):
        f(_Asks(), 0 if " or " in code else 1)
    assert ASKED[0] is CODE[code]
