"""The solver's model of a training step: units in forward order, their options, and the units that may be recomputed together.

The *base* is the step with every unit recomputed: it holds one saved input per unit. All facts are differences from it, or
absolute live bytes in it. Nothing here knows tensors or modules.

A unit is *linked* if its input is exactly the output of the unit before and nothing else holds it. Then the input need not be
held: running the unit before again gives it back. Neither a unit that can't be run again nor the one after it is linked. Without
links no run of units can be recomputed together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ullage.mechanisms import Option, Replays

NEVER_FITS = 2**50  # bytes; more than any budget, and sums of thousands of them stay within int64


def nanoseconds(seconds: float) -> int:
    """Convert to the solver's unit of cost: an integer, so that sums are exact and equal units stay equal."""
    return round(seconds * 10**9)


@dataclass(frozen=True)
class OptionFacts:
    """One option of one unit.

    Attributes:
        option: the option.
        held_bytes: bytes held between the unit's forward and backward, beyond recompute.
        own_peak_bytes: the most bytes alive while the unit's own forward or backward runs, if no unit before it holds
            anything beyond the base.
        seconds: seconds that a replay adds to the unit's backward; 0 for keep.
        record_bytes: bytes, on top of those alive at its start, that a forward needs which records for this option, its output
            included; None for the most that any option's backward needs.
        sent_bytes: bytes offloaded in the unit's forward and brought back for its backward, in all passes of a step; in whole blocks of the file.
    """

    option: Option
    held_bytes: int
    own_peak_bytes: int
    seconds: float
    record_bytes: int | None = None
    sent_bytes: int = 0

    @property
    def is_recompute(self) -> bool:
        """Does a replay run the whole forward, so that a sweep over the unit records nothing?"""
        return self.option.replays is Replays.WHOLE


@dataclass(frozen=True)
class StepModel:
    """Per unit its options and links; per prefix length the peak outside units. No mechanism, no module.

    Attributes:
        units: names, in forward order.
        options: of each unit.
        outside_bytes: [k]: the most bytes alive outside units, in forward and backward, while the first k units are held.
        base_seconds: seconds of the plain step.
        linked: [u]: whether running u - 1 again gives u's input. Empty: no unit is linked.
        link_bytes: [u]: bytes of u's input that are free from u's forward to its backward if it is not held.
        forward_seconds: [u]: seconds of a forward that records nothing.
        forward_peak_bytes: [u]: bytes, on top of those alive at its start, that such a forward needs, its output included.
        backward_base_bytes: [u]: bytes alive in the base when u's backward begins, before its replay.
        forward_base_bytes: [u]: bytes alive in the base when u's forward begins. Empty: as in its backward.
    """

    units: tuple[str, ...]
    options: tuple[tuple[OptionFacts, ...], ...]
    outside_bytes: tuple[int, ...]
    base_seconds: float
    linked: tuple[bool, ...] = ()
    link_bytes: tuple[int, ...] = ()
    forward_seconds: tuple[float, ...] = ()
    forward_peak_bytes: tuple[int, ...] = ()
    backward_base_bytes: tuple[int, ...] = ()
    forward_base_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        facts = self.link_bytes, self.forward_seconds, self.forward_peak_bytes, self.backward_base_bytes
        if any(self.linked) and not all(len(f) == len(self.units) == len(self.linked) for f in facts):
            raise ValueError("links need the bytes, the forward's seconds and peak, and the base of every unit")

    def peak(self, choice: list[int]) -> int:
        """Return the peak of an assignment (an option index per unit) without runs."""
        held, worst = 0, self.outside_bytes[0]
        for u, c in enumerate(choice):
            option = self.options[u][c]
            worst = max(worst, held + option.own_peak_bytes)
            held += option.held_bytes
            worst = max(worst, held + self.outside_bytes[u + 1])
        return worst

    def record_bytes(self, unit: int, option: int) -> int:
        """Return the bytes that a forward of `unit`, run again under `option`, needs on top of those alive at its start."""
        facts = self.options[unit][option]
        if facts.is_recompute:
            return self.forward_peak_bytes[unit]
        if facts.record_bytes is not None:
            return facts.record_bytes
        return max(o.own_peak_bytes for o in self.options[unit]) - self.backward_base_bytes[unit]
