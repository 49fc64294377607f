"""Which of a study's options a decision may choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ullage.mechanisms import Option
from ullage.planner.study._study import Study

if TYPE_CHECKING:
    from collections.abc import Hashable

Options = Mapping[str, Sequence[Option]]


@dataclass(frozen=True)
class Choices:
    """What may be chosen for each unit.

    Attributes:
        allowed: the options of each unit; None: all that the study knows of at the time of asking.
        together: units may be recomputed together.
        restrictions: what a person's overrides take away, for messages.
    """

    allowed: Options | None = None
    together: bool = True
    restrictions: tuple[str, ...] = ()

    def of(self, s: Study) -> dict[str, list[Option]]:
        """The options of each unit that have not failed on it."""
        allowed = s.options if self.allowed is None else self.allowed
        return {f: [o for o in options if not s.explored.failed(f, o.name)] for f, options in allowed.items()}

    def key(self, s: Study) -> Hashable:
        """Equal for choices that are the same now."""
        return tuple((f, tuple(options)) for f, options in self.of(s).items()), self.together


ALL = Choices()
