"""What people name in pins and in `forbid`: an option, or all options that a mechanism's name covers."""

from __future__ import annotations

from dataclasses import dataclass

from ullage.mechanisms._mechanism import Mechanism, Option, mechanisms, option_from_name


@dataclass(frozen=True)
class Named:
    """What a text names.

    Attributes:
        mechanism: whose options.
        option: the one that is named; None: all that the mechanism's name covers.
    """

    mechanism: Mechanism
    option: Option | None

    def covers(self, option: Option) -> bool:
        """Is this option one of what is named?"""
        return option.name == self.option.name if self.option is not None else self.mechanism.covers(option)

    @property
    def offloads(self) -> bool:
        """Does everything that is named offload?"""
        return self.option.offloads if self.option is not None else self.mechanism.sends

    @property
    def tier(self) -> str:
        """The tier that is named, or ""."""
        return self.option.tier if self.option is not None else ""


def named(text: str) -> Named:
    """What a pin names.

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
    """What pins may name, for messages."""
    return ", ".join(form for m in mechanisms() for form in (m.forms or (m.action,)))
