"""Apply a decision to a model in place, and undo it."""

from ullage.apply._handle import Handle, HandleReport, UnitReport, apply_plan, handle_on, model_of
from ullage.apply._wrap import Unit, disabled, install, installed, uninstall

__all__ = [
    "Handle",
    "HandleReport",
    "Unit",
    "UnitReport",
    "apply_plan",
    "disabled",
    "handle_on",
    "install",
    "installed",
    "model_of",
    "uninstall",
]
