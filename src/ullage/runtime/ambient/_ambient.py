"""Generators, autocast and global flags: read at a forward, set again for its replay.

Reading all of them costs about 6 us per call. Only those that differ are set.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ctypes import CDLL, c_size_t, c_void_p
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ullage._torch import (
    DeviceContext,
    attention_kernels,
    count_function_modes,
    function_modes,
    is_deterministic,
    warns_only,
)
from ullage.runtime.ambient._settings import put_settings, read_settings

_differ = CDLL(None).memcmp
_differ.argtypes = (c_void_p, c_void_p, c_size_t)
_kernels_enabled = tuple(get for get, _ in attention_kernels)


def _accelerator() -> str | None:
    device = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return device.type if device is not None else None


_ACCELERATOR = _accelerator()

Flags = tuple[Any, ...]
DEVICE = 9  # index of the default device in `Flags`


def read_flags() -> Flags:
    """Return autocast of each device type, its cache, deterministic algorithms, default dtype, attention kernels, device, settings."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        _ACCELERATOR is not None and torch.is_autocast_enabled(_ACCELERATOR),
        _ACCELERATOR is not None and torch.get_autocast_dtype(_ACCELERATOR),
        torch.is_autocast_cache_enabled(),
        is_deterministic(),
        warns_only(),
        torch.get_default_dtype(),
        tuple([enabled() for enabled in _kernels_enabled]),
        default_device() if count_function_modes() else None,
        read_settings(),
    )


def default_device() -> torch.device | None:
    """Return where factories make tensors, if a context or `set_default_device` says so."""
    modes = [m for m in function_modes() if isinstance(m, DeviceContext)]
    return modes[-1].device if modes else None


def autocasting() -> bool:
    """Is autocast on, for any type of device?"""
    return torch.is_autocast_enabled("cpu") or (_ACCELERATOR is not None and torch.is_autocast_enabled(_ACCELERATOR))


@contextlib.contextmanager
def flags_as(wanted: Flags, now: Flags) -> Iterator[None]:
    """Set the flags that differ, and put them back; `device_as` is for the default device."""
    cache, settings = wanted[4], wanted[10]
    with contextlib.ExitStack() as stack:
        if wanted[:5] != now[:5]:
            # `torch.autocast` is the only context that also drops its cache of casts at the end
            stack.enter_context(torch.autocast("cpu", wanted[1], enabled=wanted[0], cache_enabled=cache))
            if _ACCELERATOR is not None:
                stack.enter_context(torch.autocast(_ACCELERATOR, wanted[3], enabled=wanted[2], cache_enabled=cache))
        if wanted[5:9] != now[5:9]:
            stack.callback(_put_globals, now, wanted)
            _put_globals(wanted, now)
        if settings != now[10]:
            stack.callback(put_settings, now[10], settings)
            put_settings(settings, now[10])
        yield


@contextlib.contextmanager
def device_as(wanted: torch.device | None) -> Iterator[None]:
    """Have factories make tensors there."""
    if default_device() == wanted:
        yield
        return
    with wanted if wanted is not None else torch.device("cpu"):
        yield


def _put_globals(wanted: Flags, now: Flags) -> None:
    if wanted[5:7] != now[5:7]:
        torch.use_deterministic_algorithms(wanted[5], warn_only=wanted[6])
    if wanted[7] != now[7]:
        torch.set_default_dtype(wanted[7])
    for (_, put), want, have in zip(attention_kernels, wanted[8], now[8], strict=True):
        if want != have:
            put(want)


def put_back(was: Flags) -> None:
    """Set flags again that a forward which stopped early has left changed."""
    now = read_flags()
    if now == was:
        return
    if now[:5] != was[:5]:
        for kind, at in (("cpu", 0), *(((_ACCELERATOR, 2),) if _ACCELERATOR is not None else ())):
            torch.set_autocast_enabled(kind, was[at])
            torch.set_autocast_dtype(kind, was[at + 1])
        torch.set_autocast_cache_enabled(was[4])
    _put_globals(was, now)
    put_settings(was[10], now[10])
    if now[9] != was[9]:  # set by `torch.set_default_device`; an early stop leaves contexts in order
        torch.set_default_device(was[9])


# --- generators ------------------------------------------------------------------------------------------------------

Source = tuple[Callable[[], Any], Callable[[Any], Any]]  # get, set


def _get_cpu() -> Tensor:
    return torch.get_rng_state()  # looked up at each call, because a capture patches it


_CPU: tuple[Source, ...] = ((_get_cpu, torch.set_rng_state),)
_stand_in = threading.local()


@contextlib.contextmanager
def rng_states_from(get: Callable[[], Any], put: Callable[[Any], Any], seen: Callable[[Tensor], Any]) -> Iterator[None]:
    """In this thread, use these instead of torch's generators: a capture must not disturb the draws of other threads.

    Args:
        get: returns the state of what stands for the default generator.
        put: sets it.
        seen: called with each state of another generator, which `own_state` has read.
    """
    before = vars(_stand_in).copy()
    _stand_in.sources, _stand_in.seen = ((get, put),), seen
    try:
        yield
    finally:
        vars(_stand_in).clear()
        vars(_stand_in).update(before)


def own_state(generator: torch.Generator) -> Tensor:
    """Return the state of a generator that is not a default one; a capture counts the memory of that state."""
    state: Tensor = generator.get_state()
    seen = getattr(_stand_in, "seen", None)
    if seen is not None:
        seen(state)
    return state


def sources_for(args: Sequence[Any]) -> Sequence[Source]:
    """Return the CPU's default generator and those of the accelerators that hold the tensors in `args`, or else of the current one."""
    stood_in: Sequence[Source] | None = getattr(_stand_in, "sources", None)
    if stood_in is not None:
        return stood_in
    if _ACCELERATOR is None:
        return _CPU
    module = torch.get_device_module(_ACCELERATOR)
    if not getattr(module, "_initialized", True):
        return _CPU
    indices = {t.get_device() for t in _tensors_in(args) if t.device.type == _ACCELERATOR}
    return [*_CPU, *(_accelerator_source(module, i) for i in sorted(indices or {module.current_device()}))]


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors_in(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            yield from _tensors_in(value)


def _accelerator_source(module: Any, index: int) -> Source:
    generators = getattr(module, "default_generators", None)
    if generators:
        return generators[index].get_state, generators[index].set_state
    return (lambda: module.get_rng_state(index)), (lambda state: module.set_rng_state(state, index))


def _get_host() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set_host(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])


HOST: Source = (_get_host, _set_host)


def same_state(a: Any, b: Any) -> bool:
    """Did nobody draw between these two states of one source?"""
    if isinstance(a, Tensor):
        # compare bytes, not tensors: under a fake mode torch refuses real ones
        return bool(_differ(a.data_ptr(), b.data_ptr(), a.numel()) == 0)
    return bool(a[0] == b[0] and a[1][2:] == b[1][2:] and np.array_equal(a[1][1], b[1][1]))


def host_rng() -> tuple[Any, Any]:
    """Return the states of Python's and numpy's generators."""
    return _get_host()


def host_rng_moved(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Did somebody draw from Python's or numpy's generator between these two states?"""
    return not same_state(a, b)
