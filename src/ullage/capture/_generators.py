"""Move generators as a step's draws would, and note which modules draw from one that a replay could not put back.

A fake kernel draws nothing, but the runtime keeps the state of a generator that moved. A new state depends on the old one only, so
that a replay "draws" the same as the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ullage.runtime.state._traverse import traverse


class Generators:
    """The generators of one capture.

    Args:
        default: stands for torch's default generator, which other threads may draw from.

    Attributes:
        default: the same.
        model: the captured model, once it is made.
        lost: names of modules that draw from a generator which nothing in them leads to.
    """

    def __init__(self, default: torch.Generator) -> None:
        self.default = default
        self.model: nn.Module | None = None
        self.lost: set[str] = set()
        self._moved: list[tuple[torch.Generator, Tensor]] = []  # the step's own ones, with their states before it
        self._reached: dict[str, set[int]] = {}
        self._held: list[torch.Generator] = []

    def draw(self, generator: torch.Generator | None, modules: Sequence[str]) -> None:
        """Move the generator that an op draws from, or the default one; `modules` are those whose forward runs."""
        if generator is None or _key(generator) == _key(torch.default_generator):
            _move(self.default)
            return
        self._moved.append((generator, generator.get_state()))
        _move(generator)
        self.lost.update(name for name in modules if _key(generator) not in self._below(name))

    def put_back(self) -> None:
        """Give the step's own generators the states that they had before it."""
        while self._moved:
            generator, state = self._moved.pop()
            generator.set_state(state)

    def _below(self, name: str) -> set[int]:
        if name not in self._reached:
            module = self.model.get_submodule(name) if self.model is not None else None
            found = [g for g, _ in traverse([module], {}) if isinstance(g, torch.Generator)]
            self._reached[name] = {_key(g) for g in found}
            self._held += found  # so that no other gets the key of one of them
        return self._reached[name]


def _key(generator: torch.Generator) -> int:
    # the dispatcher gives each op a new Python object for the same generator
    return int(getattr(generator, "_cdata", id(generator)))


def _move(generator: torch.Generator) -> None:
    generator.manual_seed((generator.initial_seed() + 1) % 2**64)
