"""Overrides by the user: units pinned to an action, forbidden actions, headroom, fewer distinct actions.

Overrides take options away from units before anything is decided, so every policy and the solver obey them alike. The cost of
a pin is found by deciding once more without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from ullage._bytes import Size, format_bytes, parse_budget
from ullage._errors import ArgumentError
from ullage.mechanisms import RECOMPUTE, Option, known_names, named
from ullage.planner.explain._names import matching, units_of
from ullage.planner.study._choices import ALL, Choices
from ullage.planner.study._executed import Steps
from ullage.planner.study._options import capture_also, capture_options, views_of
from ullage.planner.study._study import Study

Options = dict[str, list[Option]]
SIMPLE_SHARE = 0.01  # of the step's time that `simple=True` may add. Not tuned


class PinCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A pin, and the seconds and bytes that it costs the plan.

    Attributes:
        pin, action: the pin as written.
        units: number of units that it matches.
        seconds: seconds that it adds to a step; negative if it saves time.
        nbytes: bytes that it adds to the peak; about 0 if the budget is used up with it and without it.
    """

    pin: str
    action: str
    units: int
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Overrides:
    """The overrides of a plan; `ullage.plan` explains each.

    Raises:
        ArgumentError: an action that does not exist, or a value of the wrong kind.
        BudgetError: the headroom is not a size.
    """

    pin: Mapping[str, str] = field(default_factory=dict)
    forbid: Collection[str] = ()
    headroom: int | str | None = None
    simple: bool | float = False

    def __post_init__(self) -> None:
        if not isinstance(self.pin, Mapping):
            raise ArgumentError(f"pin={self.pin!r}: expected a mapping from FQN globs of units to actions")
        if isinstance(self.forbid, str) or not isinstance(self.forbid, Collection):
            raise ArgumentError(f"forbid={self.forbid!r}: expected a collection of actions, such as ['select']")
        for glob, action in self.pin.items():
            _check_action(f"pin {glob!r}={action!r}", action)
        for action in self.forbid:
            _check_action(f"forbid {action!r}", action)
        if not isinstance(self.simple, bool | float) or not 0 <= self.simple <= 1:
            raise ArgumentError(
                f"simple={self.simple!r}: expected True, False or a share of the step time such as 0.02"
            )
        self._headroom()

    def _headroom(self) -> Size | None:
        given = self.headroom
        nothing = given is None or (given == 0 and not isinstance(given, bool))
        return None if given is None or nothing else parse_budget(given, "headroom")

    @property
    def needs_tier(self) -> str:
        """The first pin that offloads tensors, or ""."""
        for glob, action in self.pin.items():
            if named(action).offloads:
                return f"pin {glob!r}={action!r}"
        return ""

    def check_tier(self, tier: str) -> None:
        """Raise ArgumentError for a pin that offloads to another tier than this one."""
        other = {"host": "host_budget", "disk": "disk_directory and disk_budget"}
        for glob, action in self.pin.items():
            to = named(action).tier
            if to not in ("", tier):
                raise ArgumentError(
                    f"pin {glob!r}={action!r}: offloads to {to}, but this plan's tier is {tier}; "
                    f"pin it to {action.replace('@' + to, '@' + tier).replace(':' + to, ':' + tier)}, or give {other[to]} instead"
                )

    @property
    def tolerance(self) -> float:
        """The share of the step's time that fewer actions may add; 0 without `simple=`."""
        return SIMPLE_SHARE if self.simple is True else float(self.simple)

    def check(self, policy: str, has_budget: bool) -> None:
        """Raise ArgumentError for an override that has no meaning with this policy, before anything is captured."""
        if self._headroom() is not None and not has_budget:
            raise ArgumentError(f"headroom={self.headroom!r}: it is taken off the budget, and there is none")
        if self.tolerance and policy != "optimal":
            raise ArgumentError(f"simple: policy {policy!r} chooses nothing; it is for policy 'optimal'")

    def headroom_bytes(self, plain_bytes: int, device_bytes: int | None) -> int:
        """Return the headroom in bytes."""
        headroom = self._headroom()
        return headroom.resolve(plain_bytes, device_bytes) if headroom is not None else 0

    def restrict(self, s: Study, solver: bool) -> Restriction:
        """Return the overrides as they apply to a study; `Restriction.choices` gives the options that are left.

        Args:
            s: a study whose options are found.
            solver: the solver may be asked to choose, so all options are captured before any is taken away.

        Raises:
            ArgumentError: a pin matches no unit, contradicts another, or names an option that a unit can't have; or no option is
                left for a unit.
        """
        pinned = self._pinned(s)
        if solver and (self.pin or self.forbid):
            capture_options(s)
        everything = ALL.of(s)
        extra: dict[str, list[Option]] = {f: [] for f in everything}
        for glob, fqns in pinned.items():
            for fqn, option in _offer(s, self.pin[glob], fqns, solver):
                extra[fqn] += [option] if option not in extra[fqn] else []
        return Restriction(self, everything, extra, pinned)

    def _pinned(self, s: Study) -> dict[str, list[str]]:
        """Return the units of each glob."""
        fqns, found = [u.fqn for u in s.units], {}
        for glob in self.pin:
            found[glob] = matching(glob, fqns)
            if not found[glob]:
                modules = matching(glob, [n for n, _ in s.session.inst.model.named_modules() if n])
                hint = f"; {modules[0]} is a module but no unit: units=[{glob!r}] would make it one" if modules else ""
                raise ArgumentError(f"pin {glob!r}: no unit has such a name{hint}; the units are {_some(fqns)}")
        return found

    @property
    def words(self) -> list[str]:
        """The overrides in words, for messages."""
        pins = [f"{glob} pinned to {action}" for glob, action in self.pin.items()]
        return [*pins, *(f"{action} forbidden" for action in self.forbid)]


@dataclass(frozen=True)
class Restriction:
    """Overrides as they apply to one study.

    Attributes:
        overrides: the overrides.
        everything: all options that each unit had before them.
        extra: options that only pins ask for.
        pinned: the units of each pin.
    """

    overrides: Overrides
    everything: Options
    extra: Options
    pinned: Mapping[str, list[str]]

    def choices(self, s: Study, without: str | None = None) -> Choices:
        """Return the options that are left to choose from; `without`: a pin to ignore."""
        if not self.overrides.pin and not self.overrides.forbid:
            return ALL
        left = {u.fqn: self._left(s, u.fqn, without) for u in s.units}
        return Choices(left, restrictions=tuple(self.overrides.words))

    def _left(self, s: Study, fqn: str, without: str | None) -> list[Option]:
        options, pins = self.everything[fqn], self.overrides.pin
        globs = [g for g in pins if g != without and fqn in self.pinned[g]]
        left, before = [*options, *self.extra[fqn]] if globs else options, ""
        for glob in globs:
            if not any(is_of(o, pins[glob]) for o in (*options, *self.extra[fqn])):
                raise ArgumentError(f"pin {glob!r}={pins[glob]}: {fqn} can't have it: {self._why(s, fqn, pins[glob])}")
            left = [o for o in left if is_of(o, pins[glob])]
            if not left:
                raise ArgumentError(
                    f"pin {before!r}={pins[before]} and pin {glob!r}={pins[glob]} contradict each other: both match {fqn}; "
                    f"possible there: {_names(options)}"
                )
            before = glob
        if not globs:  # a pin is an exception to what is forbidden
            left = [o for o in options if not any(is_of(o, action) for action in self.overrides.forbid)]
            if not left and without is not None:  # otherwise ignoring the pin would leave no plan to compare with
                left = [o for o in options if is_of(o, pins[without])]
        if not left:
            words = ", ".join(self.overrides.forbid)
            why = next((f" ({u.keep_reason})" for u in s.units if u.fqn == fqn and u.keep_reason), "")
            raise ArgumentError(
                f"forbid {words}: nothing is left for {fqn}; possible there: {_names(options)}{why}; pin it to one of these"
            )
        return left

    def _why(self, s: Study, fqn: str, action: str) -> str:
        kept = next((u.keep_reason for u in s.units if u.fqn == fqn), "")
        kinds = {u.fqn: u.class_name for u in s.units}
        noted = [why for (f, n), why in s.reasons.items() if kinds[f] == kinds[fqn] and action in (n, n.split(":")[0])]
        reason = kept or next(iter(noted), "") or "there is nothing of the kind in it"
        return f"{reason}; possible: {_names(self.everything[fqn])}"

    def why(self) -> dict[str, str]:
        """Return the reason that the decision of each pinned unit gives."""
        return {f: f"pinned by {g!r}" for g, fqns in reversed(list(self.pinned.items())) for f in fqns}

    def pin_costs(self, s: Study, now: Steps, again: Callable[[Choices], Steps]) -> list[PinCost]:
        """Return the cost of each pin; `again` decides and executes under other choices."""
        rows = []
        for glob, action in self.overrides.pin.items():
            s.progress(f"finding what pin {glob} costs")
            other = again(self.choices(s, glob))
            rows.append(
                PinCost(
                    pin=glob,
                    action=action,
                    units=len(self.pinned[glob]),
                    seconds=now.seconds - other.seconds,
                    nbytes=now.peak_bytes - other.peak_bytes,
                )
            )
        return rows


def _offer(s: Study, action: str, fqns: Sequence[str], capture: bool) -> list[tuple[str, Option]]:
    """Return (unit, option) pairs that a pin adds: a named level exists on any unit that can be run again, found by the planner or not."""
    option, options = named(action).option, ALL.of(s)
    if option is None:
        return []
    able = [
        u
        for u in s.units
        if u.fqn in fqns
        and RECOMPUTE in options[u.fqn]
        and option not in options[u.fqn]
        and (u.fqn, action) not in s.reasons
    ]
    new = [view.fqn for view in views_of(s.session, able) if option.mechanism.admits(view, option)]
    if new and capture:
        capture_also(s, option, new)
    return [(f, option) for f in new if not s.explored.failed(f, option.name)]


def is_of(option: Option, action: str) -> bool:
    """Does an action name this option? A mechanism's name alone names all options that it covers."""
    return named(action).covers(option)


def _check_action(where: str, action: object) -> None:
    try:
        named(action if isinstance(action, str) else "")
    except ValueError as error:
        raise ArgumentError(f"{where}: no such action; expected {known_names()}") from error


def _names(options: Sequence[Option]) -> str:
    return ", ".join(o.name for o in options)


def _some(fqns: Sequence[str]) -> str:
    return ", ".join(fqns[:6]) + (f" and {len(fqns) - 6} more" if len(fqns) > 6 else "")


def describe(cost: PinCost) -> str:
    """Return a pin's row of the plan's table."""
    nbytes = f"{'-' if cost.nbytes < 0 else '+'}{format_bytes(abs(cost.nbytes))}"
    return f"{cost.pin}={cost.action} ({units_of(cost.units)}): step {round(cost.seconds * 1e3, 2) + 0.0:+.2f} ms, peak {nbytes}"
