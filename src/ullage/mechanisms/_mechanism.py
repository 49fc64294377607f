"""The protocol that every mechanism is written on, the options that mechanisms make, and the registry of both.

A mechanism is a way to do without a unit's saved tensors until backward asks for them: a subclass of `Mechanism`, in one
file, that `register` makes known. The planner, `apply`, `verify`, reports and the command call its methods and name no
mechanism themselves; `docs/extending.md` builds one.
"""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Protocol

from ullage._errors import ArgumentError
from ullage.runtime import Learnt, Options, Place, Rule, Site, checkpoint, run


class Replays(Enum):
    """How much of a unit's forward runs again in backward."""

    NOTHING = "nothing"
    PART = "part"
    WHOLE = "whole"


@dataclass(frozen=True)
class Option:
    """An option of a unit: a mechanism, and a level of it.

    Attributes:
        action: the mechanism's name.
        level: the mechanism's variant, in a text that the mechanism reads; "" if it has only one.
        place: the unit's place among units that are recomputed together; None if it is alone.
    """

    action: str
    level: str = ""
    place: Place | None = None

    @property
    def name(self) -> str:
        """`ACTION`, or `ACTION:LEVEL` such as `select:gelu[0]+mm[0,2]@disk`."""
        return f"{self.action}:{self.level}" if self.level else self.action

    @property
    def label(self) -> str:
        """The name, and whether the unit is recomputed together with others."""
        return self.name if self.place is None else f"{self.name} together"

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism whose option this is."""
        return _registered[self.action]

    @property
    def is_plain(self) -> bool:
        """Is the unit left as it is?"""
        return self.mechanism.is_plain

    @property
    def replays(self) -> Replays:
        """How much of the unit's forward runs again in backward."""
        return self.mechanism.replays

    @property
    def tier(self) -> str:
        """The tier that saved tensors are offloaded to, "host" or "disk"; "" if none are."""
        return self.mechanism.tier_of(self.level)

    @property
    def offloads(self) -> bool:
        """Are any saved tensors offloaded?"""
        return bool(self.tier)


class Op(Protocol):
    """An op that a unit ran."""

    @property
    def func(self) -> Any:
        """The ATen overload."""

    @property
    def args(self) -> Sequence[Any]:
        """Its positional arguments; tensors are descriptions."""


@dataclass(frozen=True)
class UnitView:
    """The facts about a unit that a mechanism gets before it makes offers.

    Attributes:
        fqn: the module's name.
        ops: the ops of its forwards in one step, in their order.
        routing: it has routing or index outputs (topk, sort, ...), which are kept under any option.
    """

    fqn: str
    ops: Sequence[Op]
    routing: bool = False


class TierView(Protocol):
    """Where tensors may be offloaded to."""

    @property
    def name(self) -> str:
        """ "host" or "disk"."""

    @property
    def write_bytes_per_second(self) -> float:
        """The speed of tensors on their way there."""


@dataclass(frozen=True)
class Offer:
    """Options that a unit may have, and why it can't have others.

    Attributes:
        options: the options, in the order in which messages list them.
        reasons: by the name of an option, why the unit can't have it.
    """

    options: tuple[Option, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


class HostTimes(Protocol):
    """The host's time on top of the ops, as the planner measured it."""

    def replays(self, selective: bool, calls: int, ops: int) -> float:
        """Return the seconds of `calls` replays that run `ops` ops each."""


class Exploration(Protocol):
    """The planner's interface for a mechanism that finds more options by running steps on fake tensors."""

    @property
    def units(self) -> Sequence[UnitView]:
        """All units, in forward order."""

    @property
    def tier(self) -> TierView | None:
        """Where tensors may be offloaded to."""

    @property
    def round_bytes(self) -> int:
        """The granularity of the device's allocator."""

    def has(self, fqn: str, option: Option) -> bool:
        """Is this still one of the unit's options?"""

    def may(self, fqn: str, option: Option) -> bool:
        """Can the unit be run again, and has the option not failed on it?"""

    def add(self, fqn: str, options: Sequence[Option]) -> None:
        """Give a unit more options."""

    def capture(self, label: str, choose: Callable[[str], Option | None]) -> None:
        """Run one step with `choose(fqn)` on each unit; None: recomputed if it can be, else kept.

        An option that fails on a unit is taken from it, and the step is run without it.
        """

    def show(self, fqns: Sequence[str], option: Option, by: str) -> None:
        """Tell that the step of unit `by` with an option stands for those of equal units, which have not run with it."""

    def learnt(self, fqn: str) -> tuple[Learnt, Sequence[float]] | None:
        """Return the op log of one call of a unit that was run selectively, and the seconds of each of its ops."""

    def forward_seconds(self, fqn: str) -> float:
        """Return the time of a unit's forward in one pass."""


class Mechanism(ABC):
    """A way to do without a unit's saved tensors until backward.

    Every method has a default. A mechanism that replays gets ullage's own replay (`run`, `traced`), which `rule` may shorten; one that
    replays nothing overrides `run`. The class's docstring says when to use the mechanism and when not to.

    Attributes:
        action: its name in plans, pins and messages: a lower-case identifier.
        forms: the texts that pins may give, for messages and help; the name alone if empty.
        policy: the name of the policy that gives every block its first option; "" for none.
        replays: how much of a unit's forward runs again in backward. A mechanism that replays is not offered to units that can only be
            kept.
        sends: every option of it offloads.
        is_plain: it leaves units as they are.
    """

    action: ClassVar[str]
    forms: ClassVar[tuple[str, ...]] = ()
    policy: ClassVar[str] = ""
    replays: ClassVar[Replays] = Replays.NOTHING
    sends: ClassVar[bool] = False
    is_plain: ClassVar[bool] = False

    def parse(self, level: str) -> Option:
        """Return the option of a level, as plans and pins write it.

        Raises:
            ValueError: there is no such level; its text, if any, says why.
        """
        if level:
            raise ValueError
        return Option(self.action)

    def covers(self, option: Option) -> bool:
        """Does the mechanism's name alone, in a pin or in `forbid`, mean this option too?"""
        return option.action == self.action

    def offers(self, unit: UnitView, tier: TierView | None) -> Offer:
        """Return the options that a unit may have."""
        return Offer((Option(self.action),))

    def admits(self, unit: UnitView, option: Option) -> bool:
        """May a unit that can be run again have an option that a pin names and the mechanism did not offer?"""
        return False

    def typical(self, options: Sequence[Option]) -> Option | None:
        """Return the option that the mechanism's policy gives a block with these options; None: none of them."""
        return next((o for o in options if o.action == self.action), None)

    def explore(self, exploration: Exploration, offered: Sequence[Option]) -> None:
        """Have each option captured once, on every unit that has it; add options that only captured steps show.

        Args:
            exploration: the planner.
            offered: what the mechanism offered for some unit.
        """
        for option in offered:
            exploration.capture(option.name, lambda fqn, o=option: o if exploration.has(fqn, o) else None)  # type: ignore[misc]

    def seconds(self, option: Option, host: HostTimes, calls: int, ops: int, again: int | None) -> float:
        """Return the seconds that a unit's option adds to a step on top of its ops.

        Args:
            option: an option of the mechanism.
            host: how long replays take.
            calls: number of the unit's calls in a step.
            ops: number of ops of these forwards.
            again: number of ops that run again in the step, if known.
        """
        return 0.0

    def tier_of(self, level: str) -> str:
        """Return the tier that an option of this level offloads to, or ""."""
        return ""

    def rule(self, option: Option, keeps_routing: bool) -> Rule | None:
        """Return the rule of the ops that a replay need not run; None: it runs all of them."""
        return None

    def run(
        self,
        site: Site,
        options: Options,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_recompute: Callable[[], None] | None,
    ) -> Any:
        """Call `call(*args, **kwargs)` so that its activations are treated as the option says.

        Args:
            site: the runtime's site of the unit.
            options: the runtime's options: the option's rule and place.
            call: the unit's plain forward.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            on_recompute: called at the start of every replay.
        """
        if self.replays is Replays.NOTHING:
            return call(*args, **kwargs)
        return run(site, options, call, args, kwargs, on_recompute)

    def traced(self, option: Option, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run in a form that Dynamo can trace in one graph: `checkpoint`, or the plain forward, which keeps everything."""
        if self.replays is Replays.NOTHING:
            return call(*args, **kwargs)
        return checkpoint(call, *args, keep=option.level or None, **kwargs)


_registered: dict[str, Mechanism] = {}


def register(mechanism: Mechanism) -> None:
    """Make a mechanism known: plans made from now on may use it, and files that name it can be read.

    A class of the same module and name replaces the earlier one: a notebook's cell was run again, or a file was loaded again.

    Raises:
        ArgumentError: its action is no lower-case identifier, or another mechanism has it.
    """
    action = getattr(mechanism, "action", None)
    if not isinstance(action, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", action):
        raise ArgumentError(
            f"mechanism {type(mechanism).__name__}: action={action!r}: expected a lower-case identifier"
        )
    other = type(_registered.get(action, mechanism))
    if (other.__module__, other.__qualname__) != (type(mechanism).__module__, type(mechanism).__qualname__):
        raise ArgumentError(
            f"mechanism {type(mechanism).__name__}: {other.__module__}.{other.__name__} has the action {action!r}; give it another"
        )
    _registered[action] = mechanism


def unregister(action: str) -> None:
    """Forget a mechanism that was registered; plans that use it can't be read any more."""
    _registered.pop(action, None)


def mechanisms() -> Iterator[Mechanism]:
    """Return all mechanisms, in the order of their registration."""
    return iter(tuple(_registered.values()))


def option_from_name(name: str) -> Option:
    """Return the option that a plan's file names; ValueError if no registered mechanism knows it."""
    action, _, level = name.partition(":")
    mechanism = _registered.get(action)
    if mechanism is None:
        raise ValueError(name)
    try:
        return mechanism.parse(level)
    except ValueError as error:
        raise ValueError(f"{name} ({error})" if str(error) else name) from None
