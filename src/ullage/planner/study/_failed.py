"""Take an option that can't be run from its unit, note the reason, and leave every other option as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from ullage._errors import CaptureError
from ullage.capture import OptionFailed
from ullage.mechanisms import Option
from ullage.planner.study._choices import ALL, Choices
from ullage.planner.study._study import Study

# Units of one class on which an option may fail before the others of the class lose it untried. Each failure costs a new session
# and a capture, so 80 equal blocks must not fail one by one. One unit may be a special case (a first block with another input);
# two of a class are taken to speak for it.
TRIED_ALONE = 2

P = ParamSpec("P")
T = TypeVar("T")


def take_away(s: Study, failed: OptionFailed, choices: Choices = ALL) -> None:
    """Take an option from the unit it failed on; then go on with a new session, in which nothing has failed.

    Once an option has failed on `TRIED_ALONE` units of a class, all units of that class lose it.

    Args:
        s: the study.
        failed: the error of the step.
        choices: the options that the unit may have.

    Raises:
        CaptureError: the unit has no other option.
    """
    # an earlier capture has recomputed the unit alone, so only recomputing it with its neighbours fails
    if failed.linked:
        s.explored.unlink(_with_next(s, failed.fqn))
    else:
        _take_option(s, failed, choices.of(s))
    session = s.another_session(explores=True)
    session.run(steps=2)  # as the session before did: `linkable` reads the calls of the first step
    s.explored.restart(session)


def _with_next(s: Study, fqn: str) -> set[str]:
    order = [u.fqn for u in s.units]
    at = order.index(fqn)
    return set(order[at : at + 2])


def _take_option(s: Study, failed: OptionFailed, options: Mapping[str, Sequence[Option]]) -> None:
    fqn, option = failed.fqn, failed.option
    if s.explored.failed(fqn, option) or not _others(options[fqn], option):
        raise CaptureError(f"{failed}; it is the only one that {fqn} may have, so allow or pin another one")
    s.explored.fail(fqn, option, failed.why, itself=True)
    kind = next(u.class_name for u in s.units if u.fqn == fqn)
    alike = [u.fqn for u in s.units if u.class_name == kind]
    if s.explored.tried(alike, option) >= TRIED_ALONE:
        for other in alike:
            has = any(o.name == option for o in options[other])
            if has and other != fqn and _others(options[other], option):
                s.explored.fail(other, option, failed.why, itself=False)


def _others(options: Sequence[Option], name: str) -> bool:
    return any(o.name != name for o in options)


def without_failures(decide: Callable[P, T]) -> Callable[P, T]:
    """Call a function again, without the option, whenever an option turns out not to run.

    The function's first argument is the study; `choices`, if it takes any, is given by name.
    """

    @functools.wraps(decide)
    def decided(*args: P.args, **kwargs: P.kwargs) -> T:
        while True:
            try:
                return decide(*args, **kwargs)
            except OptionFailed as failed:
                s, choices = args[0], kwargs.get("choices") or ALL
                assert isinstance(s, Study) and isinstance(choices, Choices)
                take_away(s, failed, choices)  # ends: each time one option fewer, or an error

    return decided
