"""What PyTorch's own tests of checkpointing check, as small programs of ours: `CASES`, by name."""

from tests.runtime.torch_cases import arguments, checks, contexts, early_stop, nesting, surroundings
from tests.runtime.torch_cases._case import CASES, Case, Result, judge, ours, torchs

__all__ = [
    "CASES",
    "Case",
    "Result",
    "arguments",
    "checks",
    "contexts",
    "early_stop",
    "judge",
    "nesting",
    "ours",
    "surroundings",
    "torchs",
]
