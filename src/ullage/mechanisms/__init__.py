"""Mechanisms, the options for a unit's activations: one file, or one folder, each. Nothing outside this folder names one.

`docs/extending.md` shows how to write another.
"""

from ullage.mechanisms._mechanism import (
    Exploration,
    HostTimes,
    Mechanism,
    Offer,
    Option,
    Replays,
    TierView,
    UnitView,
    mechanisms,
    option_from_name,
    register,
    unregister,
)
from ullage.mechanisms._named import Named, known_names, named
from ullage.mechanisms._settings import UnitSettings
from ullage.mechanisms._sites import Sites
from ullage.mechanisms.keep import KEEP
from ullage.mechanisms.recompute import RECOMPUTE
from ullage.mechanisms.select import SELECTIVE

from ullage.mechanisms import offload  # isort: skip  # noqa: F401 (registered last: options are listed in this order)

__all__ = [
    "KEEP",
    "RECOMPUTE",
    "SELECTIVE",
    "Exploration",
    "HostTimes",
    "Mechanism",
    "Named",
    "Offer",
    "Option",
    "Replays",
    "Sites",
    "TierView",
    "UnitSettings",
    "UnitView",
    "known_names",
    "mechanisms",
    "named",
    "option_from_name",
    "register",
    "unregister",
]
