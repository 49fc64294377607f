"""Settings of torch that are seldom changed and decide which kernel runs, or what it rounds to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ullage._torch import Setting, attention_order, precisions, settings, settings_of_accelerators

Settings = tuple[
    Any, ...
]  # what `_SETTINGS` give, then what `_PRECISIONS` give if one of them is not as it is by itself

# by backend and op, as of torch 2.9; what says "none" is as the one before it says that has "all"
_PAIRS = (
    ("generic", "all"),
    *(("cuda", op) for op in ("all", "matmul", "conv", "rnn")),
    *(("mkldnn", op) for op in ("all", "matmul", "conv", "rnn")),
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


def settings_of(accelerator: bool) -> tuple[Setting, ...]:
    """What there is in this torch to get and set. `accelerator`: is there one, whose kernels have settings of their own?"""
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
# of oneDNN's ops: of matmul, which `set_float32_matmul_precision` sets, too, and of two that have none of their own if all above them have none
_LAST = _PRECISIONS[-3:]
_GETTERS = tuple(get for get, _ in (*_SETTINGS, *_LAST))
_NONE = ("none",) * len(_LAST[1:])
_OF_CPU = tuple([i for i, (backend, _) in enumerate(_PAIRS) if backend != "cuda"])


def read_settings() -> Settings:
    """The settings now, to be compared as a whole."""
    try:
        found = tuple([get() for get in _GETTERS])
        if found[len(_SETTINGS) + 1 :] == _NONE:
            return found
    except RuntimeError:  # of TF32, where the program mixes torch's old and new ways to set it
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
        if want is not None and _read(get) != want:  # one that comes before it may have set it, too
            put(*want) if isinstance(want, tuple) else put(want)
    precisions: Any = dict(enumerate(wanted[len(_SETTINGS) :]))
    if len(precisions) < len(_PRECISIONS):
        precisions = {**dict.fromkeys(_OF_CPU, "none"), len(_PRECISIONS) - len(_LAST): wanted[-len(_LAST)]}
    for i, want in precisions.items():
        get, put = _PRECISIONS[i]
        if want is not None and _read(get) != want:
            put(want)
