"""How a captured step gets values that it reads and that fake tensors do not have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ullage._errors import ArgumentError

CHOICES = ("auto", "assumed", "run")
# May be assumed everywhere: shares of the elements that a mask selects, or that are distinct
SHARES = ("mask", "unique")
_LINE = re.compile(r".+:\d+")


@dataclass(frozen=True)
class Reads:
    """How values are found, see `ullage.plan`.

    Attributes:
        values: "auto", "assumed" or "run".
        assume: by "mask", "unique" or the line of a read ("model.py:41"), a share or a number.
    """

    values: str = "auto"
    assume: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values not in CHOICES:
            raise ArgumentError(f"values={self.values!r}: expected {', '.join(map(repr, CHOICES))}")
        if not isinstance(self.assume, Mapping):
            raise ArgumentError(f"assume={self.assume!r}: expected a mapping such as {{'mask': 0.15}}")
        for name, number in self.assume.items():
            if name not in SHARES and not _LINE.fullmatch(str(name)):
                raise ArgumentError(
                    f"assume: {name!r} is none of {', '.join(map(repr, SHARES))}, and no line of a read such as 'model.py:41'"
                )
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ArgumentError(f"assume: {name}={number!r}: expected a number")
            if name in SHARES and not 0 <= number <= 1:
                raise ArgumentError(f"assume: {name}={number}: expected a share between 0 and 1")
        if self.assume and self.values == "run":
            raise ArgumentError("assume: values='run' takes the values of a real step, so that nothing is assumed")

    def at(self, line: str) -> float | None:
        """The number given for `folder/file.py:line`, if that line was named."""
        return next((n for k, n in self.assume.items() if line == k or line.endswith(f"/{k}")), None)
