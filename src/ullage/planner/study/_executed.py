"""The findings of executed steps, as immutable values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from msgspec import structs

from ullage.capture import Session
from ullage.mechanisms import KEEP, Option
from ullage.planner.study._tiers import OffloadTier
from ullage.solver._channels import Event, Overlap, overlap

Key = frozenset[tuple[str, Option]]


@dataclass(frozen=True)
class StepCapture:
    """One captured step, op by op: its session's trace, its ops there, and the option of each unit."""

    session: Session
    ops: slice
    assignment: Mapping[str, Option]


@dataclass(frozen=True)
class Executed:
    """The peak, times and transfers of one captured step, with a window for tensors on their way.

    It holds no trace (some 100 MB for the largest models), so any number of them may be kept.

    Attributes:
        assignment: the option of each unit.
        tensor_bytes: the most bytes that tensors and kernels hold at any moment.
        moment: (phase, module FQN, op) of that moment.
        compute_seconds: seconds of all ops, without waits for transfers.
        ops: number of ops that ran.
        recomputed: (ops that ran again, their seconds) by module.
        offloaded_bytes: the most bytes that the tier holds at any moment, in whole blocks.
        largest_sent: bytes of the largest tensor that is offloaded.
        library_bytes: bytes that a library of the device (cuBLAS) holds all the time.
        update_bytes: the peak while the optimizer runs without activations, which no assignment changes.
        tier: where tensors are offloaded to, with its window; None if none are.
        events: computing and transfers in their order; two for each transfer and one for the rest.
        senders: by ticket, the unit that offloaded it.
        transfer_ops: per transfer, the op that comes next.
    """

    assignment: Mapping[str, Option]
    tensor_bytes: int
    moment: tuple[str, str, str]
    compute_seconds: float
    ops: int
    recomputed: Mapping[str, tuple[int, float]]
    offloaded_bytes: int
    largest_sent: int
    library_bytes: int
    update_bytes: int
    tier: OffloadTier | None = None
    events: tuple[Event, ...] = ()
    senders: Mapping[float, str] | None = None
    transfer_ops: tuple[int, ...] = ()

    @property
    def workspace_bytes(self) -> int:
        """Bytes held all the time beside tensors: the library's workspace, and the buffers of a store's transfers."""
        return self.library_bytes + (self.tier.reserved_bytes if self.tier is not None else 0)

    @property
    def peak_bytes(self) -> int:
        """The peak of the step as it was captured."""
        return self.tensor_bytes + self.workspace_bytes

    @property
    def peak_with_update(self) -> int:
        """The peak of a step that was captured without its optimizer."""
        return max(self.peak_bytes, self.update_bytes)

    @cached_property
    def overlap(self) -> Overlap | None:
        """The simulation of the transfers beside the computing; None if there are none."""
        if self.tier is None or not self.transfer_ops:
            return None
        return overlap(self.events, self.tier.channels, self.senders)

    @property
    def seconds(self) -> float:
        """The predicted time, waits for transfers included."""
        return self.compute_seconds + (self.overlap.stalled_seconds if self.overlap is not None else 0.0)

    @property
    def sent_bytes(self) -> int:
        """Bytes that are offloaded."""
        return self.overlap.sent_bytes if self.overlap is not None else 0

    @property
    def waits(self) -> list[tuple[int, float]]:
        """(op, seconds) of each op that waits for a transfer first."""
        if self.overlap is None:
            return []
        # events come in pairs (computing, transfer), so transfer k is event 2k + 1; a wait at the end comes after the last op
        return [(self.transfer_ops[k // 2], seconds) for k, seconds in self.overlap.waits]

    @property
    def window_bytes(self) -> int:
        """Bytes that tensors on their way may hold."""
        return self.tier.window_bytes if self.tier is not None else 0

    @property
    def fits_tier(self) -> bool:
        """Does the tier have room for the offloaded tensors?"""
        return self.tier is None or self.offloaded_bytes <= self.tier.capacity_bytes

    def with_window(self, window_bytes: int) -> Executed:
        """The same step with another window."""
        if self.tier is None or window_bytes == self.tier.window_bytes:
            return self
        return replace(self, tier=structs.replace(self.tier, window_bytes=window_bytes))


@dataclass(frozen=True)
class Steps:
    """A first and a later step under one assignment, executed from the workload's own state."""

    first: Executed
    later: Executed

    @property
    def assignment(self) -> Mapping[str, Option]:
        """The option of each unit."""
        return self.later.assignment

    @property
    def both(self) -> tuple[Executed, Executed]:
        """The first and the later step."""
        return self.first, self.later

    @property
    def first_is_worst(self) -> bool:
        """Does the first step peak higher?"""
        return self.first.peak_bytes > self.later.peak_bytes

    @property
    def worst(self) -> Executed:
        """The step with the higher peak; the later one if they are equal."""
        return self.first if self.first_is_worst else self.later

    @property
    def peak_bytes(self) -> int:
        """The higher peak of the two."""
        return self.worst.peak_bytes

    @property
    def seconds(self) -> float:
        """The predicted time of a later step."""
        return self.later.seconds

    @property
    def fits_tier(self) -> bool:
        """Does the tier have room for the offloaded tensors of either step?"""
        return self.first.fits_tier and self.later.fits_tier

    def with_window(self, window_bytes: int) -> Steps:
        """The same steps with another window."""
        return Steps(self.first.with_window(window_bytes), self.later.with_window(window_bytes))


def key_of(assignment: Mapping[str, Option]) -> Key:
    """Return an assignment's key: the units that are not kept, with their options."""
    return frozenset((f, o) for f, o in assignment.items() if o != KEEP)
