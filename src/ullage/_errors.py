"""One tree of exceptions: everything ullage raises on purpose is an `UllageError`.

UllageError
├── ArgumentError        an argument has a value that means nothing; also a ValueError
├── WorkloadError        the model, batch, loss, step or target can't be used as given
├── CaptureError         the step can't be run on fake tensors
│   └── AlreadyCheckpointed
├── BudgetError          the budget can't be read
│   └── BudgetInfeasible no plan fits; carries the smallest peak any plan reaches
├── PlanError            a plan file can't be read
│   └── PlanMismatch     the plan was made for another model
├── ApplyError           the plan can't be applied now
├── ReplayError          a replay differs from its forward, or can't be made equal to it
├── DeviceError          unknown device name
├── OffloadError         a store of offloaded tensors can't be opened, or could not write or read one
├── UnsupportedTorch     torch lacks a name that a feature needs, being newer or older than what ullage knows
├── MonitorError         a step of a Monitor is begun or ended out of order, or a file of one can't be read
└── VerifyError          the planned step differs from the plain one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch.utils.checkpoint import CheckpointError


class WhatHoldsThePeak(Protocol):
    """What errors know of a `ullage.Bounds`, which is made far above them."""

    @property
    def peak_bytes(self) -> int:
        """The peak."""

    @property
    def by_category(self) -> Mapping[str, int]:
        """Bytes alive then."""

    @property
    def levers(self) -> Sequence[Any]:
        """What would lower it: the `ullage.Lever` that leaves the lowest peak comes first."""

    @property
    def hint(self) -> str:
        """The two best of them, in words."""

    def advice(self) -> Sequence[str]:
        """All of them, in lines."""


class UllageError(Exception):
    """Base of every error ullage raises.

    Attributes:
        told_as: the class that a user sees where one part of ullage raises this for another; None if that is its own.
    """

    told_as: ClassVar[type[UllageError] | None] = None


class ArgumentError(UllageError, ValueError):
    """An argument has a value that means nothing; the message names it and the values that do."""


class WorkloadError(UllageError):
    """The model, batch, loss, step or target can't be used as given."""


class CaptureError(UllageError):
    """The step can't be run on fake tensors; the message names the op and the source line."""


class AlreadyCheckpointed(CaptureError):
    """The model recomputes activations by itself already; plans do not stack on that."""


class BudgetError(UllageError, ValueError):
    """The budget can't be read."""


class BudgetInfeasible(BudgetError):
    """No plan fits the budget.

    Attributes:
        budget_bytes: the budget that was asked for.
        smallest_bytes: the smallest peak any plan reaches, in bytes.
        bound_by: (phase, module FQN, op) of the moment that holds that peak.
        bounds: what is alive then and what would lower it, a `ullage.Bounds`.
    """

    def __init__(
        self,
        message: str,
        budget_bytes: int,
        smallest_bytes: int = 0,
        bound_by: tuple[str, str, str] = ("", "", ""),
        bounds: WhatHoldsThePeak | None = None,
        later: Callable[[], BudgetInfeasible] | None = None,
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self._found = smallest_bytes, bound_by, bounds
        self._later = later  # finds these three when one of them is asked for

    def _facts(self) -> tuple[int, tuple[str, str, str], WhatHoldsThePeak | None]:
        if self._later is not None:
            self._found, self._later = self._later()._facts(), None
        return self._found

    @property
    def smallest_bytes(self) -> int:
        """The smallest peak any plan reaches."""
        return self._facts()[0]

    @property
    def bound_by(self) -> tuple[str, str, str]:
        """Phase, module and op of the moment that holds that peak."""
        return self._facts()[1]

    @property
    def bounds(self) -> WhatHoldsThePeak | None:
        """The tensors alive at that moment, and the levers that would lower it."""
        return self._facts()[2]


class PlanError(UllageError):
    """A plan file can't be read."""


class PlanMismatch(PlanError):
    """The plan was made for another model, or `requires_grad` changed since planning."""


class ApplyError(UllageError):
    """The plan can't be applied to the model as it is now."""


class ReplayError(UllageError, CheckpointError):
    """A replay differs from its forward; the message names the unit, the tensor and the line.

    Also a `torch.utils.checkpoint.CheckpointError`, so that code written for torch's checkpoint catches it.
    """


class DeviceError(UllageError):
    """The device name is not in the table."""


class OffloadError(UllageError):
    """A store of offloaded tensors can't be opened or used, or could not write a tensor or read it back as it was.

    Attributes:
        path: the directory of the store.
        nbytes: bytes of the tensor, or of the file, that it is about; None where it is about neither.
    """

    def __init__(self, message: str, path: str | None = None, nbytes: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.nbytes = nbytes


class UnsupportedTorch(UllageError):
    """This torch lacks something private that a feature of ullage needs; what does not need it works.

    Attributes:
        name: its path in torch.
    """

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class MonitorError(UllageError):
    """A step of a `Monitor` is begun or ended out of order, or a file that one wrote can't be read."""


class VerifyError(UllageError):
    """The planned step differs from the plain one."""


class UllageWarning(UserWarning):
    """Something a user should know; said once."""
