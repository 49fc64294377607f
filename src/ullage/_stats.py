"""Medians and percentiles, one rule for all that is timed."""

from __future__ import annotations

from collections.abc import Sequence


def median(ordered: Sequence[float]) -> float:
    """The middle of sorted values, or the mean of the two in the middle."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else sum(ordered[half - 1 : half + 1]) / 2


def at_share(ordered: Sequence[float], share: float) -> float:
    """The value that has `share` (0 to 1) of the sorted values before it; no interpolation."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
