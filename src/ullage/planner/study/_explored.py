"""What running steps with options has shown so far: the part of a study that grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ullage.capture import Session
from ullage.mechanisms import Option
from ullage.planner.study._executed import StepCapture


class Explored:
    """A unit's options and captured steps, each found once; what has failed is never tried again.

    Nothing outside assigns to it: each method adds one finding.

    Attributes:
        session: the one that steps are run on; another one once an option has failed on it.
        options: of each unit, all that have been thought of.
        reasons: why a unit does not have an option, by (unit, option).
        captures: one step per option or level, by label; `keep` is the plain step.
        unlinked: units that can't be recomputed together with the one before.
        complete: all options have been captured, or are being.
    """

    def __init__(
        self, session: Session, plain: tuple[str, StepCapture], options: Mapping[str, Sequence[Option]]
    ) -> None:
        self.session = session
        self.options = {f: tuple(of_unit) for f, of_unit in options.items()}
        self.reasons: dict[tuple[str, str], str] = {}
        self.captures: dict[str, StepCapture] = dict([plain])
        self.unlinked: frozenset[str] = frozenset()
        self.complete = False
        self._failed: dict[tuple[str, str], bool] = {}  # by unit and option: whether it was tried there itself

    def add(self, fqn: str, options: Iterable[Option]) -> None:
        """Options that a unit may have beside those known."""
        self.options[fqn] += tuple(o for o in options if o not in self.options[fqn])

    def explain(self, fqn: str, option: str, why: str) -> None:
        """Why a unit does not have an option."""
        self.reasons[fqn, option] = why

    def begin(self) -> bool:
        """Whether options have yet to be captured; the caller does so now."""
        first, self.complete = not self.complete, True
        return first

    def keep_capture(self, label: str, capture: StepCapture) -> None:
        """A captured step."""
        self.captures[label] = capture

    def failed(self, fqn: str, option: str) -> bool:
        """Has an option failed on a unit, or on so many alike that it is not tried there?"""
        return (fqn, option) in self._failed

    def tried(self, fqns: Iterable[str], option: str) -> int:
        """On how many of these units an option has failed itself."""
        return sum(self._failed.get((f, option), False) for f in fqns)

    def fail(self, fqn: str, option: str, why: str, itself: bool) -> None:
        """An option does not run on a unit; `itself`: it was tried there."""
        self._failed[fqn, option] = itself or self._failed.get((fqn, option), False)
        self.reasons[fqn, option] = why

    def unlink(self, fqns: Iterable[str]) -> None:
        """Units that can't be recomputed together with the one before."""
        self.unlinked |= frozenset(fqns)

    def restart(self, session: Session) -> None:
        """Run further steps on a session that nothing has failed on."""
        self.session = session
