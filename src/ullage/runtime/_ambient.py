"""What surrounds a forward and must surround its replay: generators, autocast, global flags.

Reading all of it costs about 4 us per call; setting it again happens only where it differs.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_SDP = ("flash", "mem_efficient", "math", "cudnn")
_sdp_enabled = [(getattr(torch._C, f"_get_{n}_sdp_enabled"), f"_set_sdp_use_{n}") for n in _SDP]
_host_tensor = torch.device("cpu")


def _accelerator() -> str | None:
    device = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return device.type if device is not None else None


_ACCELERATOR = _accelerator()
AUTOCAST_TYPES = ("cpu",) if _ACCELERATOR is None else ("cpu", _ACCELERATOR)

Flags = tuple[Any, ...]


def read_flags() -> Flags:
    """Autocast of every device type, its cache, deterministic algorithms, default dtype, attention kernels, device."""
    device = None
    if torch._C._len_torch_function_stack():
        modes = [m for m in _get_current_function_mode_stack() if isinstance(m, DeviceContext)]
        device = modes[-1].device if modes else None
    return (
        *[(torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in AUTOCAST_TYPES],
        torch.is_autocast_cache_enabled(),
        (torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_algorithms_warn_only()),
        torch.get_default_dtype(),
        tuple(get() for get, _ in _sdp_enabled),
        device,
    )


@contextlib.contextmanager
def flags_as(wanted: Flags, now: Flags) -> Iterator[None]:
    """Set the flags that differ, and put them back."""
    n = len(AUTOCAST_TYPES)
    with contextlib.ExitStack() as stack:
        cache, deterministic, dtype, kernels, device = wanted[n:]
        for kind, (enabled, low) in zip(AUTOCAST_TYPES, wanted[:n], strict=True):
            if wanted[:n] != now[:n] or cache != now[n]:
                # the one context that also drops its cache of casts at the end
                stack.enter_context(torch.autocast(kind, low, enabled=enabled, cache_enabled=cache))
        if deterministic != now[n + 1]:
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
            stack.callback(torch.use_deterministic_algorithms, now[n + 1][0], warn_only=now[n + 1][1])
        if dtype != now[n + 2]:
            torch.set_default_dtype(dtype)
            stack.callback(torch.set_default_dtype, now[n + 2])
        for (_, setter), want, have in zip(_sdp_enabled, kernels, now[n + 3], strict=True):
            if want != have:
                getattr(torch._C, setter)(want)
                stack.callback(getattr(torch._C, setter), have)
        if device is not None:
            stack.enter_context(device)
        yield


# --- generators ------------------------------------------------------------------------------------------------------

Source = tuple[Callable[[], Any], Callable[[Any], Any]]  # get, set


def _set_cpu(state: Tensor) -> None:
    torch.set_rng_state(state)


def _get_cpu() -> Tensor:
    return torch.get_rng_state()  # looked up at each call: a capture counts these bytes


_CPU: Source = (_get_cpu, _set_cpu)


def device_sources(tensors: list[Tensor]) -> list[Source]:
    """The CPU's default generator, and those of the accelerators that hold the tensors or are current."""
    sources = [_CPU]
    if _ACCELERATOR is not None:
        module = torch.get_device_module(_ACCELERATOR)
        if getattr(module, "_initialized", True):
            indices = {t.get_device() for t in tensors if t.device.type == _ACCELERATOR} or {module.current_device()}
            sources += [_accelerator_source(module, i) for i in sorted(indices)]
    return sources


def _accelerator_source(module: Any, index: int) -> Source:
    generators = getattr(module, "default_generators", None)
    if generators:
        return generators[index].get_state, generators[index].set_state
    return (lambda: module.get_rng_state(index)), (lambda state: module.set_rng_state(state, index))


def generator_source(generator: torch.Generator) -> Source:
    """A generator of the user's own."""
    return generator.get_state, generator.set_state


def _get_host() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set_host(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])


HOST: Source = (_get_host, _set_host)


def same_state(a: Any, b: Any) -> bool:
    """Did nobody draw between these two states of one source?"""
    if isinstance(a, Tensor):
        return bool(a.numpy().tobytes() == b.numpy().tobytes())
    return bool(a[0] == b[0] and a[1][2:] == b[1][2:] and np.array_equal(a[1][1], b[1][1]))


def host_rng() -> tuple[Any, Any]:
    """The state of Python's and numpy's generator."""
    return _get_host()


def host_rng_moved(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Did Python's or numpy's generator move?"""
    return not same_state(a, b)
