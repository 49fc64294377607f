"""Bytes alive at a moment as a tree of modules, for a treemap: sizes add up to the live bytes at every level."""

from __future__ import annotations

import msgspec

from ullage.report._sides import NO_MODULE
from ullage.report._timeline import Timeline


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A module with everything in it, or (`category` is not "") one category of the module's own tensors.

    Attributes:
        key: the module's FQN; of a category, with it behind a space. "" is the model.
        parent: the key of the node around it; None for the model.
        label: the last part of the name, or the category.
        nbytes: of this and all in it.
    """

    key: str
    parent: str | None
    label: str
    category: str
    nbytes: int


def tree(t: Timeline, event: int | None = None) -> list[Node]:
    """The nodes of an event (None: the peak), each after its parent; the first is the model, of all live bytes."""
    sizes: dict[str, int] = {"": 0}
    leaves: list[tuple[str, str, int]] = []
    for h in t.holdings(event):
        module = h.module or NO_MODULE
        leaves.append((module, h.category, h.nbytes))
        for key in ["", *_path(module)]:
            sizes[key] = sizes.get(key, 0) + h.nbytes
    nodes = [
        Node(k, _parent(k), k.rpartition(".")[2], "", n)
        for k, n in sorted(sizes.items(), key=lambda x: (_depth(x[0]), -x[1]))
    ]
    return nodes + [Node(f"{m} {c}", m, c, c, n) for m, c, n in leaves]


def _path(module: str) -> list[str]:
    """`a`, `a.b`, `a.b.c`."""
    parts = module.split(".") if module != NO_MODULE else [module]
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def _parent(key: str) -> str | None:
    return key.rpartition(".")[0] if key else None


def _depth(key: str) -> int:
    return key.count(".") + 1 if key else 0
