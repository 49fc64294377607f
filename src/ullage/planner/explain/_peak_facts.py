"""A step's peak, the peak without some of its tensors, and `Lever`: a change that would lower it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from ullage.capture import Session
from ullage.mechanisms import Option
from ullage.planner.study._choices import Choices
from ullage.planner.study._executed import StepCapture, Steps
from ullage.planner.study._liveness import Ledger, Mask, moment
from ullage.planner.study._study import Study

SMALL_SHARE = 0.01  # of the peak: a group that holds less is no lever, as taking all of it out would hardly show


class Lever(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A change that would lower the peak.

    Attributes:
        what: the group of tensors.
        nbytes: bytes of the group that are alive at the peak.
        peak_bytes: the peak of the step without the group (`executed`: of the step that was run so).
        phase, module, op: the moment of that peak.
        seconds: seconds that the change adds to a step; 0 if it costs no time, or if that is not known.
        how: what to do.
        executed: the step was run this way on fake tensors; otherwise the group's bytes were taken out of the timeline.
    """

    what: str
    nbytes: int
    peak_bytes: int
    phase: str
    module: str
    op: str
    seconds: float
    how: str
    executed: bool


@dataclass(frozen=True)
class PeakFacts:
    """A first and a later step under an assignment, and the op at which they peak."""

    s: Study
    choices: Choices
    steps: Steps
    captures: tuple[StepCapture, StepCapture]
    ledger: Ledger
    at: int

    @property
    def assignment(self) -> Mapping[str, Option]:
        """The option of each unit."""
        return self.steps.assignment

    @property
    def session(self) -> Session:
        """The session of both steps."""
        return self.captures[0].session

    @property
    def peak_bytes(self) -> int:
        """The peak, in bytes."""
        return self.steps.peak_bytes

    def without(self, some: Mask, share: float = 1.0) -> tuple[int, int]:
        """Return (peak in bytes, op) of the steps without this share of some storages."""
        left = self.ledger.timeline.peak - (self.ledger.alive_bytes(some) * share).astype(np.int64)
        ops = max((c.ops for c in self.captures), key=lambda o: int(left[o].max()))
        op = int(ops.start) + int(left[ops].argmax())
        return int(left[op]) + self.steps.later.workspace_bytes, op

    def held(self, some: Mask) -> int:
        """Return the bytes of some storages at the peak."""
        return int(self.ledger.nbytes[some & self.ledger.alive_at(self.at)].sum())

    def records(self, ids: frozenset[int]) -> Mask:
        """Return the mask of the storages with these record ids."""
        return np.array([id(t) in ids for t in self.ledger.trace.storages], np.bool_)

    def matters(self, nbytes: int) -> bool:
        """Are these bytes enough of the peak to be a lever?"""
        return nbytes >= max(SMALL_SHARE * self.peak_bytes, 1)

    def taken_out(self, what: str, some: Mask, how: str, share: float = 1.0) -> Iterator[Lever]:
        """Yield the lever that takes some storages out, unless they hold next to nothing."""
        if self.matters(nbytes := self.held(some)):
            peak, op = self.without(some, share)
            yield _lever(what, nbytes, peak, moment(self.session, op), how)

    def run_instead(self, what: str, nbytes: int, steps: Steps, how: str) -> Lever:
        """Return the lever whose steps were run."""
        worst = max(steps.both, key=lambda e: e.peak_bytes)
        seconds = steps.seconds - self.steps.seconds
        return _lever(what, nbytes, worst.peak_bytes, worst.moment, how, seconds, executed=True)


def _lever(
    what: str,
    nbytes: int,
    peak: int,
    where: tuple[str, str, str],
    how: str,
    seconds: float = 0.0,
    executed: bool = False,
) -> Lever:
    phase, module, op = where
    return Lever(
        what=what,
        nbytes=nbytes,
        peak_bytes=peak,
        phase=phase,
        module=module,
        op=op,
        seconds=seconds,
        how=how,
        executed=executed,
    )
