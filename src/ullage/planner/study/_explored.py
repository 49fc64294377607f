"""The part of a study that grows: options found, captured steps, and failures, as steps run with more options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ullage.capture import Session
from ullage.mechanisms import Option
from ullage.planner.study._executed import StepCapture


class Explored:
    """The options of units and the captured steps, each found once. An option that failed on a unit is not tried there again.

    Nobody assigns to it from outside: each method adds one finding.

    Attributes:
        session: the session that runs steps; a new one after an option has failed.
        options: all options found so far, by unit.
        reasons: why a unit does not have an option, by (unit, option).
        captures: one step per option or level, by label; `keep` is the plain step.
        shown: by (unit, option) the equal unit that ran with the option in its stead.
        unlinked: units that can't be recomputed together with the unit before.
        complete: all options are captured, or are being captured.
    """

    def __init__(
        self, session: Session, plain: tuple[str, StepCapture], options: Mapping[str, Sequence[Option]]
    ) -> None:
        self.session = session
        self.options = {f: tuple(of_unit) for f, of_unit in options.items()}
        self.reasons: dict[tuple[str, str], str] = {}
        self.captures: dict[str, StepCapture] = dict([plain])
        self.shown: dict[tuple[str, Option], str] = {}
        self.unlinked: frozenset[str] = frozenset()
        self.complete = False
        self._failed: dict[tuple[str, str], bool] = {}  # by unit and option: whether it was tried there itself

    def add(self, fqn: str, options: Iterable[Option]) -> None:
        """Add options that a unit may have."""
        self.options[fqn] += tuple(o for o in options if o not in self.options[fqn])

    def explain(self, fqn: str, option: str, why: str) -> None:
        """Note why a unit does not have an option."""
        self.reasons[fqn, option] = why

    def begin(self) -> bool:
        """Return whether options are not captured yet; if so, the caller captures them now."""
        first, self.complete = not self.complete, True
        return first

    def keep_capture(self, label: str, capture: StepCapture) -> None:
        """Add a captured step."""
        self.captures[label] = capture

    def show(self, fqns: Iterable[str], option: Option, by: str) -> None:
        """Note that one unit has run with an option for others that are equal to it."""
        self.shown |= {(fqn, option): by for fqn in fqns}

    def failed(self, fqn: str, option: str) -> bool:
        """Has an option failed on a unit, or on so many units of its class that it is not tried there?"""
        return (fqn, option) in self._failed

    def tried(self, fqns: Iterable[str], option: str) -> int:
        """Return on how many of these units an option was tried and failed."""
        return sum(self._failed.get((f, option), False) for f in fqns)

    def fail(self, fqn: str, option: str, why: str, itself: bool) -> None:
        """Note that an option does not run on a unit; `itself`: it was tried there."""
        self._failed[fqn, option] = itself or self._failed.get((fqn, option), False)
        self.reasons[fqn, option] = why

    def unlink(self, fqns: Iterable[str]) -> None:
        """Note units that can't be recomputed together with the unit before."""
        self.unlinked |= frozenset(fqns)

    def restart(self, session: Session) -> None:
        """Run further steps on a session in which no option has failed."""
        self.session = session
