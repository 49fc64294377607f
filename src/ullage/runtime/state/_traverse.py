"""Everything that some roots reach, each object once: the one loop over `_walk`, and what of each object can be put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ullage.runtime.state._classes import ClassFields, classes_in
from ullage.runtime.state._walk import MODULE_FIELDS, MOST_NODES, OPAQUE_TYPES, children, is_opaque, is_part, places

# How something was reached: the way to what has it (None: it is a root), the step from there, what a person calls that step.
Way = tuple[Any, Any, Any]
Parts = Callable[[Any], Iterable[tuple[Any, Any, Any]]]
_SKIPPED = OPAQUE_TYPES - {type}


def traverse(
    roots: Sequence[Any], seen: dict[int, Any], parts: Parts = children, classes: bool = False, most: int = MOST_NODES
) -> Iterator[tuple[Any, Way]]:
    """Yield each object and the way to it, root by root, near ones first.

    Args:
        roots: where to start.
        seen: what not to look at, by id; what is looked at is added. It holds them, as ids of the dead are used again.
        parts: what to look at next from an object, in the form of `children`.
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
    """What a person would call what is there."""
    labels: list[str] = []
    while way[0] is not None:
        labels.append(str(way[2]))
        way = way[0]
    return ".".join(label for label in reversed(labels) if label)


def with_classes(obj: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The children of an object, and the classes that a user has written: its own, those that its code loads; and what these hold."""
    if isinstance(obj, type):
        for value in ClassFields(obj).below():
            yield None, "", value
    elif not is_part(obj):
        for cls in classes_in(obj):
            yield None, "", cls
        yield from children(obj)


def hooks_of(obj: Any) -> Iterator[tuple[Any, Any, Any]]:
    """What backward runs of a tensor or a module, in the form of `children`."""
    groups: tuple[Any, ...] = ()
    if isinstance(obj, Tensor):
        groups = (obj._backward_hooks, getattr(obj, "_post_accumulate_grad_hooks", None))
    elif isinstance(obj, nn.Module):
        groups = tuple(obj.__dict__.get(name) for name in ("_backward_hooks", "_backward_pre_hooks"))
    for hook in [hook for group in groups if group for hook in group.values()]:
        yield None, "hook", hook


def all_places(obj: Any) -> Iterator[Any]:
    """What of an object, or of a class, can be given other content; of a module its modules and hooks, too."""
    if isinstance(obj, type):
        yield ClassFields(obj)
        return
    for _, place in places(obj):
        yield place
    if isinstance(obj, nn.Module):  # a forward may register and remove some
        yield from [v for k, v in obj.__dict__.items() if k in MODULE_FIELDS and isinstance(v, dict | set)]
