"""How a name that torch does not promise is looked up, and what stands where one is gone.

`import ullage` never fails for want of such a name: what is bound in its place raises `UnsupportedTorch` when it is used. A name is looked
up once, so one that is there costs at each use what it costs in torch itself.
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
        what: what it is for.
        feature: what can't be done without it, as `UnsupportedTorch` says it.
        instead: what is done in its place where it is gone; "" if nothing can be.
        said: can that change a plan or what a replay computes, so that a warning and the plan's notes say it?
        since: the oldest version in which it was seen, of those from `OLDEST` on; it was in all after it, up to `NEWEST`.
        found: is it there?
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
    """What has that name in torch; where it is gone the stand-in, or what raises `UnsupportedTorch` when it is called.

    Args:
        name, what, feature, instead, said, since: see `Private`.
        through: what is bound if the name is there, where that is not what has the name (a value that is to be read anew each time).
        stand_in: what is bound in its place.
        beside: names that are listed already and are used wherever this one is: attributes, which can't be bound.
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
    """As `find`, of a class: one that has no instances stands where it is gone, so classes can be derived from it.

    Args:
        name, what, feature, beside: see `find`.
        asked: is what is an instance asked in order to use that? Without the class nobody knows, so the question raises.
    """
    found = find(name, what, feature, beside=beside)
    if not isinstance(found, Missing):
        return found

    def refuse(cls: type, *args: Any, **kwargs: Any) -> NoReturn:
        found()

    kind: Any = type("Asked", (type,), {"__instancecheck__": refuse}) if asked else type
    return kind(name.rpartition(".")[2], (), {"__new__": refuse, "__doc__": f"Stands for `{name}`, which is gone."})


def find_error(name: str, what: str, feature: str, *, instead: str) -> Any:
    """As `find`, of a class of errors: where it is gone, one that nobody raises."""
    return find(name, what, feature, instead=instead, stand_in=type(name.rpartition(".")[2], (Exception,), {}))


def attribute(name: str, what: str, feature: str) -> str:
    """List an attribute that is read where it stands; the names that are used with it are found `beside` it."""
    find(name, what, feature)
    return name


def look_up(name: str) -> Any:
    """What has that path in torch, or `_NOTHING`."""
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
    """What is otherwise than in the versions that ullage knows, for a plan to say."""
    return [f"{p}: {p.instead}" for p in PRIVATE.values() if p.said and not p.found and at_least(p.since)]


def table() -> list[str]:
    """The rows of docs/private-torch.md."""
    return [
        f"| `{p.name}` | {p.seen} | {p.what} | {p.instead + (' (said)' if p.said else '') if p.instead else f'{p.feature} raises'} |"
        for p in PRIVATE.values()
    ]


def tell() -> None:
    """Warn of the same, once in a process: for units that no plan speaks of."""
    global _told
    if not _told:
        _told = True
        for note in notes():
            warnings.warn(note, UllageWarning, stacklevel=3)


_told = False


class Missing:
    """Stands where a name of torch's is gone: whoever calls it, or asks it for a part, is told so."""

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
