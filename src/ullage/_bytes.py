"""Bytes in and out: budgets as a person writes them, sizes as a person reads them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ullage._errors import BudgetError

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_NUMBER = r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_HINT = "give bytes (an int), a size with its unit such as '6GiB' or '6 GB', '60% of plain' or '90% of device'"


@dataclass(frozen=True)
class Size:
    """A budget or another size as written: either `bytes`, or `fraction` of the plain peak or of the device's memory."""

    bytes: int | None = None
    fraction: float | None = None
    of: str | None = None

    def resolve(self, plain_bytes: int, device_bytes: int | None) -> int:
        """Return it in bytes."""
        if self.bytes is not None:
            return self.bytes
        assert self.fraction is not None
        if self.of == "plain":
            return int(plain_bytes * self.fraction)
        if device_bytes is None:
            raise BudgetError("budget: '% of device' needs a device whose memory is known; name one or give bytes")
        return int(device_bytes * self.fraction)


def parse_budget(budget: int | str, name: str = "budget") -> Size:
    """Read a budget, or another size that is written the same way.

    Args:
        budget: bytes, or a text: "6GiB" (2**30), "6 GB" (10**9), "60% of plain" or "90% of device".
        name: of the argument, for messages.

    Raises:
        BudgetError: not a positive size, no unit, an unknown unit, or a bare fraction.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise BudgetError(f"{name}={budget!r}: {_why_not(budget)}; {_HINT}")
    if isinstance(budget, int):
        return _positive(budget, budget, name)
    text = budget.strip()
    if match := re.fullmatch(rf"({_NUMBER})\s*%\s*of\s*(plain|device)", text):
        fraction = float(match[1]) / 100
        if not 0 < fraction < math.inf:
            raise BudgetError(f"{name}={budget!r}: must be above zero; {_HINT}")
        return Size(fraction=fraction, of=match[2])
    if text.endswith("%"):
        raise BudgetError(f"{name}={budget!r}: percent of what? write '{text} of plain' or '{text} of device'")
    match = re.fullmatch(rf"({_NUMBER})\s*([a-zA-Z]+)", text)
    if not match or match[2].lower() not in _UNITS:
        raise BudgetError(f"{name}={budget!r}: {_why_not_text(text, match)}; {_HINT}")
    value = float(match[1]) * _UNITS[match[2].lower()]
    if not math.isfinite(value):
        raise BudgetError(f"{name}={budget!r}: too large for a size; {_HINT}")
    return _positive(int(value), budget, name)


def _why_not(budget: object) -> str:
    if isinstance(budget, float):
        return "a bare fraction says nothing of its meaning (bytes? a share, and of what?)"
    return f"a {type(budget).__name__} is not a size"


def _why_not_text(text: str, match: re.Match[str] | None) -> str:
    if match:
        return f"{match[2]!r} is not a unit"
    return "a number without its unit" if re.fullmatch(_NUMBER, text) else "not a size"


def _positive(value: int, budget: int | str, name: str) -> Size:
    if value <= 0:
        raise BudgetError(f"{name}={budget!r}: must be above zero; {_HINT}")
    return Size(bytes=value)


def format_bytes(value: float) -> str:
    """Return a size with its unit, GiB being 2^30."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{int(value)} B"


def format_seconds(value: float) -> str:
    """Return a time with its unit."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
