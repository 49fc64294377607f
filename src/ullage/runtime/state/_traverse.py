"""Visit everything that some roots reach, each object once: the only loop over `_walk`. And the places of an object to put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ullage.runtime.state._classes import ClassFields, classes_in
from ullage.runtime.state._walk import MODULE_FIELDS, MOST_NODES, OPAQUE_TYPES, children, is_opaque, is_part, places

# How an object was reached: its holder's way (None: it is a root), the step from the holder, the name of that step for a person.
Way = tuple[Any, Any, Any]
Parts = Callable[[Any], Iterable[tuple[Any, Any, Any]]]
_SKIPPED = OPAQUE_TYPES - {type}


def traverse(
    roots: Sequence[Any], seen: dict[int, Any], parts: Parts = children, classes: bool = False, most: int = MOST_NODES
) -> Iterator[tuple[Any, Way]]:
    """Yield each object and the way to it, root by root, near ones first.

    Args:
        roots: where to start.
        seen: objects to skip, by id; visited ones are added. It holds them, because the id of a freed object is used again.
        parts: yields where to go on from an object, in the form of `children`.
        classes: yield classes too, if `parts` gives some.
        most: end when so many have been seen.
    """
    skipped = _SKIPPED if classes else OPAQUE_TYPES
    for i, root in enumerate(roots):
        todo: deque[tuple[Any, Way]] = deque([(root, (None, i, ""))])
        take, add = todo.popleft, todo.append
        while todo and len(seen) <= most:
            obj, way = take()
            if id(obj) in seen or (is_opaque(obj) and not (classes and isinstance(obj, type))):
                continue
            seen[id(obj)] = obj
            yield obj, way
            for step, label, child in parts(obj):
                if type(child) not in skipped:
                    add((child, (way, step, label)))


def name_of(way: Way) -> str:
    """Return the name that a person would use for the object at the end of a way."""
    labels: list[str] = []
    while way[0] is not None:
        labels.append(str(way[2]))
        way = way[0]
    return ".".join(label for label in reversed(labels) if label)


def with_classes(obj: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the children of an object, and the user's classes: its own and those that its code loads. Of a class, yield its attributes."""
    if isinstance(obj, type):
        for value in ClassFields(obj).below():
            yield None, "", value
    elif not is_part(obj):
        for cls in classes_in(obj):
            yield None, "", cls
        yield from children(obj)


def hooks_of(obj: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the hooks of a tensor or a module that backward runs, in the form of `children`."""
    groups: tuple[Any, ...] = ()
    if isinstance(obj, Tensor):
        groups = (obj._backward_hooks, getattr(obj, "_post_accumulate_grad_hooks", None))
    elif isinstance(obj, nn.Module):
        groups = tuple(obj.__dict__.get(name) for name in ("_backward_hooks", "_backward_pre_hooks"))
    for hook in [hook for group in groups if group for hook in group.values()]:
        yield None, "hook", hook


def all_places(obj: Any) -> Iterator[Any]:
    """Yield the places of an object or a class whose content can change; of a module its modules and hooks, too."""
    if isinstance(obj, type):
        yield ClassFields(obj)
        return
    for _, place in places(obj):
        yield place
    if isinstance(obj, nn.Module):  # a forward may register and remove some
        yield from [v for k, v in obj.__dict__.items() if k in MODULE_FIELDS and isinstance(v, dict | set)]
