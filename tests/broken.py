"""Replays that lack one thing: what must notice them is tested with these."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ullage.mechanisms import UnitSettings
from ullage.runtime.ambient import _ambient
from ullage.runtime.state._state import State


@contextlib.contextmanager
def _patched(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any) -> Iterator[None]:
    with monkeypatch.context() as m, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtime says at once that its replay gave other values
        m.setattr(owner, name, value)
        yield


def without_rng(monkeypatch: pytest.MonkeyPatch) -> contextlib.AbstractContextManager[None]:
    """Generators are not put back."""
    real = UnitSettings.runtime_options.func
    broken = property(lambda self: replace(real(self), preserve_rng_state=False))
    return _patched(monkeypatch, UnitSettings, "runtime_options", broken)


def without_autocast(monkeypatch: pytest.MonkeyPatch) -> contextlib.AbstractContextManager[None]:
    """Autocast and flags are not put back."""
    return _patched(monkeypatch, _ambient, "flags_as", lambda wanted, now: contextlib.nullcontext())


def without_state(monkeypatch: pytest.MonkeyPatch) -> contextlib.AbstractContextManager[None]:
    """Buffers and attributes are not put back."""
    return _patched(monkeypatch, State, "put", lambda self: None)
