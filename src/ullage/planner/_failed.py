"""What becomes of a unit's option that can't be run: it is taken from that unit, with the reason noted, and nothing else is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ullage._errors import CaptureError
from ullage.capture import OptionFailed
from ullage.planner._study import Study

TRIED_ALONE = 2  # units of one class on which an option may fail before the others of the class lose it untried

P = ParamSpec("P")
T = TypeVar("T")


def take_away(s: Study, failed: OptionFailed) -> None:
    """Take an option from the unit it failed on; then go on with a session of which nothing has failed.

    A step is captured anew for each failure. So once an option has failed on `TRIED_ALONE` units of a class, it is taken from all
    units of that class.

    Raises:
        CaptureError: the unit has no other option.
    """
    if failed.linked:  # it can be run again, as an earlier capture showed, but not together with its neighbours
        s.unlinked |= _with_next(s, failed.fqn)
    else:
        _take_option(s, failed)
    s.model = None
    s.session = s.another_session(explores=True)
    s.session.run(steps=2)  # as the one before: what it noted of the first step is asked for


def _with_next(s: Study, fqn: str) -> set[str]:
    order = [u.fqn for u in s.units]
    at = order.index(fqn)
    return set(order[at : at + 2])


def _take_option(s: Study, failed: OptionFailed) -> None:
    kind = next(u.class_name for u in s.units if u.fqn == failed.fqn)
    of_class = [u.fqn for u in s.units if u.class_name == kind]
    s.failed.add((failed.fqn, failed.option))
    everywhere = sum((f, failed.option) in s.failed for f in of_class) >= TRIED_ALONE
    for fqn in of_class if everywhere else [failed.fqn]:
        left = [o for o in s.options[fqn] if o.name != failed.option]
        if len(left) == len(s.options[fqn]) or not left:
            if fqn == failed.fqn:
                raise CaptureError(f"{failed}; it is the only one that {fqn} may have, so allow or pin another one")
            continue
        s.options[fqn] = left
        s.reasons[fqn, failed.option] = failed.why


def without_failures(decide: Callable[P, T]) -> Callable[P, T]:
    """Do it again whenever an option turns out not to run, without that option. The first argument is the study."""

    @functools.wraps(decide)
    def decided(*args: P.args, **kwargs: P.kwargs) -> T:
        while True:
            try:
                return decide(*args, **kwargs)
            except OptionFailed as failed:
                s = args[0]
                assert isinstance(s, Study)
                take_away(s, failed)  # an option fewer each time, or an error

    return decided
