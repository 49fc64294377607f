"""What may be done with a unit's activations. The planner sees options, never a mechanism."""

from ullage.mechanisms._options import KEEP, RECOMPUTE, SELECT_LEVELS, Option, option_from_name
from ullage.mechanisms._run import UnitSettings, host_rng, host_rng_moved, is_recomputing, recomputing_units, run_unit

__all__ = [
    "KEEP",
    "RECOMPUTE",
    "SELECT_LEVELS",
    "Option",
    "UnitSettings",
    "host_rng",
    "host_rng_moved",
    "is_recomputing",
    "option_from_name",
    "recomputing_units",
    "run_unit",
]
