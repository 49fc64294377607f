"""What may be done with a unit's activations. The planner sees options, never a mechanism."""

from ullage.mechanisms._options import KEEP, OFFLOAD, RECOMPUTE, Option, option_from_name
from ullage.mechanisms._run import Sites, UnitSettings, run_unit

__all__ = ["KEEP", "OFFLOAD", "RECOMPUTE", "Option", "Sites", "UnitSettings", "option_from_name", "run_unit"]
