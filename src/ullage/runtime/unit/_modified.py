"""What stands in the place of a saved tensor that has changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modified:
    """In the place of a saved tensor that is not what it was: told only if backward asks for it, as by autograd.

    Attributes:
        shape: its shape.
        by: what changed between forward and backward and went into it; "" if the unit itself writes to it after it was saved.
        now: what it is now.
        argument: it is an argument of a unit in this one, whose backward may do without it.
    """

    shape: torch.Size
    by: str = ""
    _version: int = 0
    now: Tensor | None = None
    argument: bool = False
