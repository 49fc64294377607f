"""Attributes of classes that a user has written: state that all objects of a class share."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from enum import Enum
from typing import Any

from ullage.runtime.state._content import View
from ullage.runtime.state._walk import functions_of, global_names, is_library

# attributes of these types are code: no state, and nothing to follow
_CODE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    staticmethod,
    classmethod,
    property,
)


class ClassFields(View):
    """The attributes of a class itself, without methods and the like."""

    __slots__ = ()

    def read(self) -> dict[Any, Any]:
        fields = list(vars(self.owner).items())
        return {k: v for k, v in fields if not (k.startswith("__") and k.endswith("__")) and not isinstance(v, _CODE)}

    def put(self, content: dict[Any, Any]) -> None:
        now = self.read()
        for name in now.keys() - content.keys():
            type.__delattr__(self.owner, name)
        for name, value in content.items():
            if name not in now or now[name] is not value:
                type.__setattr__(self.owner, name, value)

    def below(self) -> list[Any]:
        """Return the attributes, the methods (they have defaults and closures) and the user's base classes: a walk goes on from these."""
        methods = [fn for method in functions_of(self.owner) if (fn := method()) is not None]
        return [*self.read().values(), *methods, *_written_by_users(self.owner.__mro__[1:])]


def classes_in(obj: Any) -> list[type]:
    """Return classes that a user has written: an object's own, and those whose names a function loads."""
    if isinstance(obj, types.FunctionType):
        if is_library(obj.__code__.co_filename):
            return []
        values = obj.__globals__
        names = global_names(obj.__code__)[0]
        return list(_written_by_users(v for n in names if isinstance(v := values.get(n), type)))
    return list(_written_by_users([type(obj)] if not isinstance(obj, type) else []))


def _written_by_users(classes: Any) -> Iterator[type]:
    for cls in classes:
        # a class of C has no attributes that can be set; members of an enum are constants
        if cls.__flags__ & 512 and not issubclass(cls, Enum) and _is_users(cls.__module__):
            yield cls


def _is_users(module: Any) -> bool:
    if module == "__main__":
        return True
    found = sys.modules.get(module) if isinstance(module, str) else None
    file = getattr(found, "__file__", None)
    return file is not None and not is_library(file)
