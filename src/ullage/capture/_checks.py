"""Choose a condition's value so that the step goes on, where one of its two branches only raises.

`if not valid.all(): raise ValueError(...)` and `assert (x > 0).all()` check values, which a step on fake tensors does not have.
A step that trains passes its checks.
"""

from __future__ import annotations

import dis
import functools
import sys
from pathlib import Path
from types import CodeType, FrameType

import torch

from ullage._source import OURS

_TORCH = Path(torch.__file__).parent
_DISPATCH = (OURS, str(_TORCH / "_subclasses"), str(_TORCH / "utils" / "_python_dispatch.py"))
_MOST = 300  # instructions followed from a branch to its `raise`: an f-string message takes fewer


def value_that_passes(frame: FrameType | None = None) -> bool | None:
    """Return the value whose branch does not raise; None unless exactly one branch of the current condition only raises.

    `frame`: the frame that asks for the value; default: the innermost one that does not dispatch an op.
    """
    frame = frame or sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_DISPATCH):
        frame = frame.f_back
    return None if frame is None else _passes(frame.f_code, frame.f_lasti)


def raised_on_purpose(error: BaseException) -> bool:
    """Did a `raise` or an `assert` in Python raise this error, rather than a call into C?"""
    at = error.__traceback__
    if at is None:
        return False
    while at.tb_next is not None:
        at = at.tb_next
    return any(i.offset == at.tb_lasti and i.opname == "RAISE_VARARGS" for i in _instructions(at.tb_frame.f_code))


@functools.lru_cache(maxsize=64)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PRECALL")]


def _passes(code: CodeType, offset: int) -> bool | None:
    found = _instructions(code)
    at = next((k for k, i in enumerate(found) if i.offset >= offset), None)
    negated = False
    while at is not None and at < len(found):
        name = found[at].opname
        if name.startswith("POP_JUMP") and name.endswith(("IF_TRUE", "IF_FALSE")):
            there = next((k for k, i in enumerate(found) if i.offset == found[at].argval), len(found))
            jumps, falls = _only_raises(found, there), _only_raises(found, at + 1)
            if jumps == falls:
                return None
            return (name.endswith("IF_TRUE") != jumps) != negated
        if name == "UNARY_NOT":
            negated = not negated
        elif name not in ("TO_BOOL", "NOT_TAKEN") and not (name.startswith("CALL") and found[at].offset <= offset + 2):
            return None
        at += 1
    return None


def _only_raises(found: list[dis.Instruction], at: int) -> bool:
    """Does this branch lead to a `raise` without another branch?"""
    for instruction in found[at : at + _MOST]:
        name = instruction.opname
        if name in ("RAISE_VARARGS", "RERAISE"):
            return True
        if "JUMP" in name or name.startswith(("RETURN", "FOR_", "YIELD", "SEND")):
            return False
    return False
