"""Units whose replay is not what their forward was, by state that nobody can see: told at every call that it may have made wrong, not once."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ullage
from tests.runtime.steps import unit
from ullage.runtime import Shared, Site


def _counting() -> Callable[[Tensor], Tensor]:
    """Each call multiplies by another number; what counts is an object of C."""
    count = itertools.count(1)
    return lambda x: (x * next(count)).sin()


def _seen(call: Callable[[], Any]) -> list[str]:
    """What a person sees under Python's own filters, each warning that is shown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, ullage.UllageWarning)]


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_calls_already_made_warn_one_by_one_and_later_ones_are_kept(keep: str | None) -> None:
    f, site = _counting(), Site("unit")
    call = unit(site, keep)
    xs = [torch.ones(3, requires_grad=True) for _ in range(4)]
    outs = [call(f, x) for x in xs]

    def backward() -> None:
        for out in outs:
            out.sum().backward()

    found = [text for text in _seen(backward) if "full replay" not in text]
    assert len(found) == 4 and all("differ from the plain step's" in text for text in found)
    assert "saved tensor 0" in found[0]
    first = (
        9 if keep is None else 10
    )  # 4 forwards and 4 replays have counted, and a selective one that was not believed
    for n in range(first, first + 3):
        x = torch.ones(3, requires_grad=True)
        assert _seen(lambda x=x: call(f, x).sum().backward()) == []
        assert torch.equal(x.grad, n * torch.cos(torch.ones(3) * n))
    assert any("its activations are kept" in note for note in site.notes)


def test_units_of_one_structure_are_not_trusted_either() -> None:
    shared = Shared()
    first, second = unit(Site("first", shared=shared), None), unit(Site("second", shared=shared), None)
    f = _counting()
    a, b = first(f, torch.ones(3, requires_grad=True)), second(f, torch.ones(3, requires_grad=True))
    assert len(_seen(lambda: a.sum().backward())) == 1
    assert [text.startswith("second: ") for text in _seen(lambda: b.sum().backward())] == [True]
    x = torch.ones(3, requires_grad=True)
    assert _seen(lambda: second(f, x).sum().backward()) == [] and x.grad is not None


def test_a_warning_names_the_users_line_and_filters_are_obeyed() -> None:
    out = unit(Site("unit"), None)(_counting(), torch.ones(3, requires_grad=True))
    with pytest.warns(ullage.UllageWarning, match="may differ") as caught:
        out.sum().backward()
    assert caught[0].filename == __file__
    out = unit(Site("unit"), None)(_counting(), torch.ones(3, requires_grad=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ullage.UllageWarning)
        out.sum().backward()


def test_under_values_a_call_raises_and_later_ones_are_kept() -> None:
    f = _counting()

    def g(x: Tensor) -> Tensor:
        return f(x)

    first, second = (
        ullage.checkpoint(g, torch.ones(3, requires_grad=True), determinism_check="values") for _ in range(2)
    )
    for out in (first, second):
        with pytest.raises(ullage.ReplayError, match="gave other values than its forward .*later calls keep"):
            out.sum().backward()
    x = torch.ones(3, requires_grad=True)
    ullage.checkpoint(g, x, determinism_check="values").sum().backward()
    assert torch.equal(x.grad, 5 * torch.cos(torch.ones(3) * 5))
