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
    """The options that a decision may choose from.

    Attributes:
        allowed: the options of each unit; None: all options that the study knows when it is asked.
        together: units may be recomputed together.
        restrictions: the user's overrides in words, for messages.
    """

    allowed: Options | None = None
    together: bool = True
    restrictions: tuple[str, ...] = ()

    def of(self, s: Study) -> dict[str, list[Option]]:
        """Return the options of each unit that have not failed on it."""
        allowed = s.options if self.allowed is None else self.allowed
        return {f: [o for o in options if not s.explored.failed(f, o.name)] for f, options in allowed.items()}

    def key(self, s: Study) -> Hashable:
        """Return a key that is equal for choices that are the same now."""
        return tuple((f, tuple(options)) for f, options in self.of(s).items()), self.together


ALL = Choices()
