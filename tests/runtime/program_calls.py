"""How a block of a random program is called: what calls it, in what its arguments lie, what it gives back."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.runtime.program_units import Unit

PASSINGS, CALLS = 6, 6  # of the first constructs
MORE_PASSINGS, MORE_CALLS = 10, 10


@dataclass
class Result:
    """A result of no container that torch knows."""

    value: Tensor
    other: Any = None
    name: str = "result"


@dataclass
class Given:
    """Arguments in a dataclass."""

    first: Tensor
    rest: list[Tensor] = field(default_factory=list)
    count: int = 0


class Slots:
    """Arguments in slots."""

    __slots__ = ("count", "first", "rest")

    def __init__(self, first: Tensor, rest: list[Tensor]) -> None:
        self.first, self.rest, self.count = first, rest, 0


class OwnDict(dict[str, Any]):
    """A dict of the model's own."""


class OwnList(list[Any]):
    """A list of the model's own."""


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a container, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Slots):
        value = [value.first, value.rest]
    elif is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list | tuple | deque | set):
        return []
    return [t for v in value for t in tensors_of(v)]


def arguments(tensors: list[Tensor], passing: int, flag: bool) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    named: dict[str, Any] = {f"t{i}": t for i, t in enumerate(tensors)}
    if passing == 1:
        return [tensors[0]], {f"t{i}": t for i, t in enumerate(tensors[1:])} | {"flag": flag}
    if passing == 2:
        return [tensors], {"flag": flag, "scale": 0.5}
    if passing == 3:
        return [named, None], {"flag": flag}
    if passing == 4:
        return [tuple(tensors), "name", 3], {}
    if passing == 5:
        return [Result(tensors[0], tensors[1:])], {"flag": flag}
    if passing >= PASSINGS:
        return [_container(tensors, named, passing - PASSINGS)], {"flag": flag}
    return list(tensors), {"flag": flag}


def _container(tensors: list[Tensor], named: dict[str, Any], kind: int) -> Any:
    makers: list[Callable[[], Any]] = [
        lambda: OrderedDict(named),
        lambda: deque(tensors),
        lambda: {tensors[0]},
        lambda: Given(tensors[0], tensors[1:]),
        lambda: OwnDict(named),
        lambda: OwnList(tensors),
        lambda: Slots(tensors[0], tensors[1:]),
        lambda: defaultdict(list, named),
        lambda: [OwnList(tensors), deque([1])],
        lambda: list(tensors),
    ]
    return makers[kind % len(makers)]()


def _apply(unit: Unit, *args: Any, **kwargs: Any) -> Any:
    return unit(*args, **kwargs)


def _through(units: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the first of some modules; one function for all of them."""
    first = next(iter(units.values() if isinstance(units, dict) else units))
    return first(*args, **kwargs)


class _Slotted:
    __slots__ = ("unit",)

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.unit(*args, **kwargs)


class _Runner:
    def __init__(self, units: list[Unit]) -> None:
        self.units = units

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.units[0](*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return _through(self.units, *args, **kwargs)


@dataclass
class _Holder:
    units: OwnList

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.units[0](*args, **kwargs)


def callable_of(unit: Unit, call: int, args: list[Any], extra: Tensor) -> tuple[Callable[..., Any], list[Any]]:
    """What is called, and with which positional arguments."""
    if call == 1:
        return unit.forward, args
    if call == 2:
        return (lambda *a, **k: unit(*a, **k)), args
    if call == 3:
        return functools.partial(unit, args[0]), args[1:]
    if call == 4:  # a tensor that it closes over
        return (lambda *a, **k: unit(extra, *a, **k)), args
    if call == 5:
        return _apply, [unit, *args]
    if call >= CALLS:
        return _held(unit, call - CALLS), args
    return unit, args


def _held(unit: Unit, kind: int) -> Callable[..., Any]:
    """A function that reaches the unit through a container or an object."""
    kind %= MORE_CALLS
    if kind == 0:
        return functools.partial(_through, [unit])
    if kind == 1:
        return _Slotted(unit).run
    if kind == 2:
        return _Runner([unit])
    if kind == 3:
        units = {"unit": unit}
        return lambda *a, **k: units["unit"](*a, **k)
    if kind == 4:
        by_name = OwnDict(unit=unit)

        def with_default(*args: Any, of: Any = by_name, **kwargs: Any) -> Any:
            return of["unit"](*args, **kwargs)

        return with_default
    if kind == 5:
        return functools.partial(functools.partial(_through, OrderedDict(unit=unit)))
    if kind == 6:
        return _Holder(OwnList([unit])).run
    if kind == 7:
        return _Runner([unit]).run
    if kind == 8:
        queue = deque([unit])
        return lambda *a, **k: _through(queue, *a, **k)
    less = {n: p * 0.9 for n, p in unit.named_parameters()}
    return lambda *a, **k: torch.func.functional_call(unit, less, a, k)


def result_of(live: list[Tensor], entered: int, returns: int) -> Any:
    """What a block gives back."""
    last, before = live[-1], live[-2] if len(live) > entered + 1 else live[0]
    if returns == 1:
        return last, None, before
    if returns == 2:
        return {"last": last, "none": None, "list": [before]}
    if returns == 3:
        return Result(last, before)
    if returns == 4:
        return [last, live[0]]  # its own input
    if returns == 5:
        return last, before.detach(), 3
    return last
