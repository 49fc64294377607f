"""Settings of torch that are seldom changed and decide which kernel runs, or how it rounds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ullage._torch import Setting, attention_order, precisions, settings, settings_of_accelerators

Settings = tuple[Any, ...]  # values of `_SETTINGS`, then those of `_PRECISIONS` if one of them is not the default

# (backend, op) of torch 2.9's precision settings. One that says "none" follows its backend's "all", and that one ("generic", "all")
_PAIRS = (
    ("generic", "all"),
    *(("cuda", op) for op in ("all", "matmul", "conv", "rnn")),
    *(("mkldnn", op) for op in ("all", "matmul", "conv", "rnn")),
)
_SMALLEST = 2.0**-1022  # the smallest normal double: half of it is 0.0 if the processor flushes denormals


def _flushes() -> bool:
    return _SMALLEST * 0.5 == 0.0


def _answers(get: Callable[[], Any]) -> bool:
    try:
        get()
    except Exception:
        return False
    return True


def settings_of(accelerator: bool) -> tuple[Setting, ...]:
    """Return the settings that this torch can get and set. `accelerator`: include those of an accelerator's kernels."""
    pairs = (*settings, *settings_of_accelerators) if accelerator else settings
    found = [(get, put) for get, put in pairs if _answers(get)]
    if accelerator and attention_order is not None:
        order, reorder = attention_order
        found.append((lambda: tuple(order()), lambda *wanted: reorder(list(wanted))))
    einsum = torch.backends.opt_einsum
    if einsum.is_available():
        found += [
            (functools.partial(getattr, einsum, name), functools.partial(setattr, einsum, name))
            for name in ("enabled", "strategy")
        ]
    return (*found, (torch.get_num_threads, torch.set_num_threads), (_flushes, torch.set_flush_denormal))


def _precisions() -> tuple[Setting, ...]:
    if precisions is None or not _answers(lambda: [precisions[0](*pair) for pair in _PAIRS]):
        return ()
    get, put = precisions
    return tuple([(functools.partial(get, *pair), functools.partial(put, *pair)) for pair in _PAIRS])


_SETTINGS = settings_of(
    torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
)
_PRECISIONS = _precisions()
# The three of oneDNN's ops. `set_float32_matmul_precision` sets the one of matmul, too; the other two say "none" as long as nobody
# has set a precision in the new way, so a call reads these three instead of all nine.
_LAST = _PRECISIONS[-3:]
_GETTERS = tuple(get for get, _ in (*_SETTINGS, *_LAST))
_NONE = ("none",) * len(_LAST[1:])
_OF_CPU = tuple([i for i, (backend, _) in enumerate(_PAIRS) if backend != "cuda"])


def read_settings() -> Settings:
    """Return the settings now, to be compared as a whole."""
    try:
        found = tuple([get() for get in _GETTERS])
        if found[len(_SETTINGS) + 1 :] == _NONE:
            return found
    except RuntimeError:  # torch raises if the program mixes its old and new ways to set TF32
        pass
    return tuple([_read(get) for get, _ in (*_SETTINGS, *_PRECISIONS)])


def _read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:
        return None


def put_settings(wanted: Settings, now: Settings) -> None:
    """Set those that differ."""
    if wanted == now:
        return
    for (get, put), want in zip(_SETTINGS, wanted, strict=False):
        if want is not None and _read(get) != want:  # read again: an earlier setting may have set this one, too
            put(*want) if isinstance(want, tuple) else put(want)
    precisions: Any = dict(enumerate(wanted[len(_SETTINGS) :]))
    if len(precisions) < len(_PRECISIONS):
        precisions = {**dict.fromkeys(_OF_CPU, "none"), len(_PRECISIONS) - len(_LAST): wanted[-len(_LAST)]}
    for i, want in precisions.items():
        get, put = _PRECISIONS[i]
        if want is not None and _read(get) != want:
            put(want)
