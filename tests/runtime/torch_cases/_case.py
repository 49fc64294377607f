"""What a case is: a small program of ours that checks one behaviour which PyTorch's own tests check."""

from __future__ import annotations

import gc
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint as tc
from torch import Tensor

import ullage
from ullage.runtime.forward import _checkpoint

Checkpoint = Callable[..., Any]


class Skip(Exception):
    """This torch or this machine has not what the case is about."""


@dataclass(frozen=True)
class Case:
    """One behaviour.

    Attributes:
        run: raises if a checkpoint function does not behave so.
        of: PyTorch's test, as class and name; "" if none of theirs checks this.
        row: the first column of its row in docs/runtime.md's table of differences, where ullage differs on purpose.
    """

    run: Callable[[Checkpoint], None]
    of: str
    row: str


CASES: dict[str, Case] = {}


def case(of: str = "", row: str = "") -> Callable[[Callable[[Checkpoint], None]], Callable[[Checkpoint], None]]:
    """Enter a case under its function's name."""

    def enter(run: Callable[[Checkpoint], None]) -> Callable[[Checkpoint], None]:
        assert run.__name__ not in CASES, run.__name__
        CASES[run.__name__] = Case(run, of, row)
        return run

    return enter


def torchs(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint`, the kind that is not reentrant."""
    return tc.checkpoint(function, *args, use_reentrant=False, **kwargs)


def ours(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`ullage.checkpoint`, as code written for torch's calls it."""
    return ullage.checkpoint(function, *args, use_reentrant=False, **kwargs)


@dataclass(frozen=True)
class Result:
    """What became of a case: "passes", "fails" or "skipped", why, and what ullage warned of."""

    how: str
    why: str = ""
    warned: tuple[str, ...] = ()


def judge(one: Case, checkpoint: Checkpoint) -> Result:
    """Run a case from a fresh start."""
    _checkpoint._sites.clear()
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        how, why = "passes", ""
        try:
            one.run(checkpoint)
        except Skip as skip:
            how, why = "skipped", str(skip)
        except Exception as error:  # what a case finds may be of any kind
            how, why = "fails", f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    if how == "fails":
        gc.collect()  # what it has left
    return Result(how, why, tuple(str(w.message) for w in caught if issubclass(w.category, ullage.UllageWarning)))


def raises(kind: type[Exception], text: str, function: Callable[[], Any]) -> Exception:
    """The error that this raises; it must be of that kind and have this text in it."""
    try:
        function()
    except kind as error:
        assert text in str(error), f"{text!r} is not in {str(error)[:200]!r}"
        return error
    raise AssertionError(f"no {kind.__name__} is raised")


class Unseen(io.StringIO):
    """A file with a list: no replay puts back what is noted there."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Any] = []


def leaf(*shape: int) -> Tensor:
    """A new tensor that needs a gradient."""
    return torch.randn(shape).requires_grad_()


def same(found: Any, wanted: Any) -> None:
    """These tensors are equal, bit for bit."""
    found, wanted = (list(v) if isinstance(v, list | tuple) else [v] for v in (found, wanted))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), "not bit for bit the plain step's"


def gradients(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Gradients of the sum of what a function gives."""
    out = function(*inputs)
    return list(torch.autograd.grad(out.sum(), inputs))
