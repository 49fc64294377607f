"""Look up private names of torch, and bind a stand-in for a missing one.

`import ullage` never fails because such a name is missing: its stand-in raises `UnsupportedTorch` when it is used. A name is looked up
once, so an existing one costs no more at each use than in torch itself.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ullage._errors import UllageWarning, UnsupportedTorch

_NOTHING: Any = object()
OLDEST, NEWEST = "2.11", "2.14"  # the versions in which names were looked for


@dataclass(frozen=True)
class Private:
    """One name.

    Attributes:
        name: its path in torch.
        what: its purpose.
        feature: the feature that needs it, in the words of `UnsupportedTorch`.
        instead: what ullage does without it; "" if nothing can replace it.
        said: may that change a plan or a replay's results, so that a warning and the plan's notes say it?
        since: the oldest version, from `OLDEST` on, in which it was seen; all later ones up to `NEWEST` have it.
        found: does this torch have it?
    """

    name: str
    what: str
    feature: str
    instead: str
    said: bool
    since: str
    found: bool

    @property
    def seen(self) -> str:
        """The versions in which it was seen."""
        return f"{self.since} to {NEWEST}"

    def __str__(self) -> str:
        return f"torch {torch.__version__} has no `{self.name}`"


PRIVATE: dict[str, Private] = {}


def find(
    name: str,
    what: str,
    feature: str,
    *,
    through: Any = _NOTHING,
    instead: str = "",
    stand_in: Any = _NOTHING,
    said: bool = False,
    since: str = OLDEST,
    beside: tuple[str, ...] = (),
) -> Any:
    """Return the object with that name in torch; without it the stand-in, or an object that raises `UnsupportedTorch` when called.

    Args:
        name, what, feature, instead, said, since: see `Private`.
        through: returned in place of the object, if that exists (for a value that must be read again each time).
        stand_in: returned if the object does not exist.
        beside: names that are listed already and are always used with this one: attributes, which can't be bound.
    """
    found = look_up(name)
    entry = PRIVATE[name] = Private(name, what, feature, instead, said, since, found is not _NOTHING)
    gone = entry if not entry.found else next((PRIVATE[n] for n in beside if not PRIVATE[n].found), None)
    if gone is None:
        return found if through is _NOTHING else through
    if stand_in is _NOTHING:
        return Missing(gone, feature)
    return stand_in


def at_least(version: str) -> bool:
    """Is this torch that one or newer?"""
    here = torch.__version__.partition("+")[0].split(".")[:2]
    return tuple(map(int, here)) >= tuple(map(int, version.split(".")))


def find_class(name: str, what: str, feature: str, *, beside: tuple[str, ...] = (), asked: bool = False) -> Any:
    """Find a class; the stand-in for a missing one is a class without instances, so that others can be derived from it.

    Args:
        name, what, feature, beside: see `find`.
        asked: does the feature use `isinstance` with it? Without the class the answer is unknown, so the question raises.
    """
    found = find(name, what, feature, beside=beside)
    if not isinstance(found, Missing):
        return found

    def refuse(cls: type, *args: Any, **kwargs: Any) -> NoReturn:
        found()

    kind: Any = type("Asked", (type,), {"__instancecheck__": refuse}) if asked else type
    return kind(name.rpartition(".")[2], (), {"__new__": refuse, "__doc__": f"Stands for `{name}`, which is gone."})


def find_error(name: str, what: str, feature: str, *, instead: str) -> Any:
    """Find a class of errors; the stand-in for a missing one is a class that nobody raises."""
    return find(name, what, feature, instead=instead, stand_in=type(name.rpartition(".")[2], (Exception,), {}))


def attribute(name: str, what: str, feature: str) -> str:
    """List an attribute that other files read in place; names that are used with it are found `beside` it."""
    find(name, what, feature)
    return name


def look_up(name: str) -> Any:
    """Return the object with that path in torch, or `_NOTHING`."""
    first, *rest = name.split(".")
    path, found = first, importlib.import_module(first)
    for part in rest:
        path = f"{path}.{part}"
        below = getattr(found, part, _NOTHING)
        if below is _NOTHING and hasattr(found, "__path__"):  # a module that nobody has imported yet
            try:
                below = importlib.import_module(path)
            except ImportError:
                return _NOTHING
        if below is _NOTHING:
            return _NOTHING
        found = below
    return found


def notes() -> list[str]:
    """Return notes for a plan about stand-ins in use that may change it."""
    return [f"{p}: {p.instead}" for p in PRIVATE.values() if p.said and not p.found and at_least(p.since)]


def table() -> list[str]:
    """Return the rows of docs/private-torch.md."""
    return [
        f"| `{p.name}` | {p.seen} | {p.what} | {p.instead + (' (said)' if p.said else '') if p.instead else f'{p.feature} raises'} |"
        for p in PRIVATE.values()
    ]


def tell() -> None:
    """Warn with the same notes, once in a process: for units without a plan."""
    global _told
    if not _told:
        _told = True
        for note in notes():
            warnings.warn(note, UllageWarning, stacklevel=3)


_told = False


class Missing:
    """Stands for a missing name of torch's: calling it, or asking it for an attribute, raises `UnsupportedTorch`."""

    __slots__ = ("_entry", "_feature")

    def __init__(self, entry: Private, feature: str) -> None:
        self._entry, self._feature = entry, feature

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _error(self._entry, self._feature)

    def __dir__(self) -> NoReturn:
        raise _error(self._entry, self._feature)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python's own questions, such as `inspect`'s
            raise AttributeError(name)
        raise _error(self._entry, self._feature)


def _error(entry: Private, feature: str) -> UnsupportedTorch:
    return UnsupportedTorch(
        f"{feature} needs `{entry.name}` ({entry.what}), which torch {torch.__version__} does not have (torch {entry.seen} do): "
        "install one of these, or an ullage that knows this torch",
        entry.name,
    )
