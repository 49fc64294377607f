"""Settings of torch that are seldom changed and decide which kernel runs, or what it rounds to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Settings = tuple[Any, ...]

_NAMES = (
    "mkldnn_enabled",
    "mkldnn_deterministic",
    "cudnn_enabled",
    "cudnn_benchmark",
    "cudnn_deterministic",
    "float32_matmul_precision",  # before what it decides, too
    "cudnn_allow_tf32",
    "cublas_allow_tf32",
    "cublas_allow_fp16_reduced_precision_reduction",
    "cublas_allow_bf16_reduced_precision_reduction",
    "cublas_allow_fp16_accumulation",
)
_SMALLEST = 2.0**-1022  # the smallest normal number: half of it is 0.0 where denormals are flushed


def _flushes() -> bool:
    return _SMALLEST * 0.5 == 0.0


def _answers(get: Callable[[], Any]) -> bool:
    try:
        get()
    except Exception:
        return False
    return True


def _found() -> tuple[tuple[Callable[[], Any], Callable[..., Any]], ...]:
    pairs = [(getattr(torch._C, f"_get_{n}", None), getattr(torch._C, f"_set_{n}", None)) for n in _NAMES]
    found = [(get, put) for get, put in pairs if get is not None and put is not None and _answers(get)]
    return (*found, (torch.get_num_threads, torch.set_num_threads), (_flushes, torch.set_flush_denormal))


_SETTINGS = _found()
_GETTERS = tuple(get for get, _ in _SETTINGS)


def read_settings() -> Settings:
    """The settings now, to be compared as a whole."""
    try:
        return tuple([get() for get in _GETTERS])
    except RuntimeError:  # of TF32, where the program mixes torch's old and new ways to set it
        return tuple([_read(get) for get in _GETTERS])


def _read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:
        return None


def put_settings(wanted: Settings, now: Settings) -> None:
    """Set those that differ."""
    for (_, put), want, have in zip(_SETTINGS, wanted, now, strict=True):
        if want != have and want is not None and have is not None:
            put(*want) if isinstance(want, tuple) else put(want)
