"""Names in pins and in `forbid`: of one option, or of all options that a mechanism's name covers."""

from __future__ import annotations

from dataclasses import dataclass

from ullage.mechanisms._mechanism import Mechanism, Option, mechanisms, option_from_name


@dataclass(frozen=True)
class Named:
    """The options that a text names.

    Attributes:
        mechanism: their mechanism.
        option: the one option that is named; None: all options that the mechanism's name covers.
    """

    mechanism: Mechanism
    option: Option | None

    def covers(self, option: Option) -> bool:
        """Does the text name this option?"""
        return option.name == self.option.name if self.option is not None else self.mechanism.covers(option)

    @property
    def offloads(self) -> bool:
        """Do all named options offload?"""
        return self.option.offloads if self.option is not None else self.mechanism.sends

    @property
    def tier(self) -> str:
        """The tier that is named, or ""."""
        return self.option.tier if self.option is not None else ""


def named(text: str) -> Named:
    """Read the text of a pin.

    Raises:
        ValueError: no registered mechanism knows it.
    """
    for mechanism in mechanisms():
        if text == mechanism.action:
            try:
                return Named(mechanism, mechanism.parse(""))
            except ValueError:  # it has levels: the name alone means any of them
                return Named(mechanism, None)
    option = option_from_name(text)
    return Named(option.mechanism, option)


def known_names() -> str:
    """Return the names that pins may use, for messages."""
    return ", ".join(form for m in mechanisms() for form in (m.forms or (m.action,)))
