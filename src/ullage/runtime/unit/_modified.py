"""The stand-in for a saved tensor whose values changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modified:
    """Stands in for a saved tensor that has other values now. It is an error only if backward asks for it, as in autograd.

    Attributes:
        shape: the tensor's shape.
        by: name of the tensor that changed between forward and backward and that this one was computed from; "" if the unit
            itself writes to this tensor after it was saved.
        now: the tensor as it is now.
        argument: an inner unit holds it as an argument, and that unit's backward may not need it.
    """

    shape: torch.Size
    by: str = ""
    _version: int = 0
    now: Tensor | None = None
    argument: bool = False
