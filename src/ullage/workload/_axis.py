"""A workload as a function of one whole number: its batch size, its sequence length, or a keyword of its factory."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ullage._errors import ArgumentError
from ullage.workload._target import check_factory_options, find_factory, load_target
from ullage.workload._workload import Workload


def check_axis(make: Callable[..., Any], axis: str) -> None:
    """Raise ArgumentError unless `make` takes `axis` as a keyword whose default, if it has one, is a whole number."""
    if not callable(make):
        raise ArgumentError(f"make_work: expected a callable that takes {axis}=, got {type(make).__name__}")
    if not isinstance(axis, str):
        raise ArgumentError(f"axis={axis!r}: expected the name of a keyword")
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return
    known = {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if axis not in known:
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        takes = f"it takes {', '.join(known)}" if known else "it takes no keywords"
        raise ArgumentError(f"axis={axis!r}: no keyword of {getattr(make, '__name__', repr(make))}; {takes}")
    default = known[axis]
    if default not in (inspect.Parameter.empty, None) and (isinstance(default, bool) or not isinstance(default, int)):
        raise ArgumentError(f"axis={axis!r}: its default is {default!r}, not a whole number")


def target_along(target: str, axis: str, **options: Any) -> Callable[..., Workload]:
    """A function from `axis=` to a target's workload; models are built under fake tensors only, so of any size.

    Args:
        target: see `load_target`.
        axis: "batch" or "seq" of a config, any integer keyword of a factory.
        options: what else `load_target` takes.

    Raises:
        ArgumentError: the target has no such axis, or the options set it.
        WorkloadError: see `load_target`.
    """
    if target.endswith(".json"):
        if axis not in ("batch", "seq"):
            raise ArgumentError(f"axis={axis!r}: of a config.json it is batch or seq")
        if options.get(axis) is not None:
            raise ArgumentError(f"{axis}={options[axis]}: this is what is looked for; leave it out, or set at_most")

        def from_config(**at: int) -> Workload:
            return load_target(target, **{**options, **at})

        return from_config
    check_factory_options(target, **options)
    factory = find_factory(target)
    check_axis(factory, axis)

    def from_factory(**at: int) -> Workload:
        build = functools.partial(factory, **at)
        build.__name__ = f"{getattr(factory, '__name__', repr(factory))}({axis}={at[axis]})"  # type: ignore[attr-defined]
        return Workload.from_factory(build)

    return from_factory
