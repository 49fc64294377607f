"""Values that depend on activations and that a step reads all the same: `loss.item()` for a log, a norm, an accuracy.

The capture makes up a value and notes it. The step is then captured again with other values. If it runs the same ops, the value
does not steer it; if not, the step can't be planned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ullage._errors import CaptureError
from ullage.capture._checks import value_that_passes
from ullage.capture._trace import tensors_of

MOST_BYTES = 1 << 26  # a larger array is refused rather than made up. Not tuned
REMEDY = (
    "keep that value a tensor (torch.where instead of `if`, a tensor as a factor), give it with the batch, or move what "
    "depends on it out of the step"
)


class Assumed:
    """Makes up values that a step reads. A plan uses those of `trial` 0, and the captures of trials 1 and 2 are compared with it."""

    TRIALS = (1, 2)

    def __init__(self, trial: int, notes: dict[str, None]) -> None:
        self.trial, self._notes = trial, notes
        self.read: dict[str, None] = {}  # lines that read a value
        self._count = 0

    def scalar(self, dtype: torch.dtype, where: str) -> bool | int | float | complex:
        """Return a value for a tensor of one element."""
        if dtype is torch.bool:
            passes = value_that_passes()
            if passes is not None:
                self._notes[f"{where}: a check of values, which raises if it fails; it is taken to pass"] = None
                return passes
        self._note(where)
        k = self._count
        if dtype is torch.bool:
            return (False, True, k % 2 == 0)[self.trial]
        if not dtype.is_floating_point and not dtype.is_complex:
            return (1, 3 + k % 3, 0)[self.trial]
        value = (1.0, 100.0 + k, -100.0 - k)[self.trial]  # no two alike, for steps that compare them
        return complex(value, 0.0) if dtype.is_complex else value

    def array(self, tensor: Tensor, where: str) -> npt.NDArray[Any]:
        """Return values for a whole tensor.

        Raises:
            CaptureError: the tensor is too large.
        """
        if tensor.numel() * tensor.element_size() > MOST_BYTES:
            raise CaptureError(
                f"{where}: .numpy() asks for {tensor.numel()} values that depend on activations; move it out of the step"
            )
        self._note(where)
        kind = torch.zeros((), dtype=tensor.dtype).numpy().dtype
        if self.trial == 0:
            return np.ones(tuple(tensor.shape), kind)
        ramp = np.arange(tensor.numel()).reshape(tuple(tensor.shape))
        if kind == np.bool_:
            return np.asarray(ramp % 2 == self.trial - 1)
        values = ramp % 5 if np.issubdtype(kind, np.integer) else (ramp + 100 if self.trial == 1 else -100 - ramp)
        return np.asarray(values, kind)

    def _note(self, where: str) -> None:
        self._count += 1
        if where not in self.read:
            self.read[where] = None
            self._notes[
                f"{where}: reads a value that depends on activations; it was taken to be 1, and the step does the same ops "
                "where it is 100 or -100"
            ] = None


def check_assumed(session: Any, another: Callable[[int], Any], steps: int) -> None:
    """Capture the steps of a session again, with other values in place of those that it made up.

    Args:
        session: a session that has run `steps` plain steps.
        another: makes a session of the same workload for a trial.
        steps: number of steps.

    Raises:
        CaptureError: the step's ops depend on one of the values.
    """
    read = session.values.assumed.read
    if not read:
        return
    for trial in Assumed.TRIALS:
        other = another(trial)
        try:
            other.run(steps=steps)
        except CaptureError as error:
            if error.__cause__ is not None and other.raised_on_purpose:
                session.values.assumptions[f"a check of values raised for others than 1 ({error}); taken to pass"] = (
                    None
                )
                continue
            raise CaptureError(_steers(read)) from error
        if _ops(session) != _ops(other):
            raise CaptureError(_steers(read))


def _steers(read: dict[str, None]) -> str:
    where = ", ".join(read)
    return (
        f"{where}: a value that depends on activations is read and steers the step (data-dependent control flow): with another "
        f"value it does other ops. A step on fake tensors has no such values; {REMEDY}; if it is an optimizer that reads "
        "them (LBFGS), plan with an optimizer that reads no values given as a callable (optimizer=torch.optim.AdamW, here or "
        "in Workload.from_factory)"
    )


def _ops(session: Any) -> list[Any]:
    """Return the ops that ran, without reads, and without the numbers among their arguments, which may be made-up values."""
    kinds = [(s.func, tensors_of((s.args, s.kwargs)), s.outputs) for s in session.signatures]
    ran = [(kinds[i], phase) for i, phase in zip(session.trace.signature, session.trace.phase, strict=True)]
    return [op for op in ran if op[0][0] is not torch.ops.aten._local_scalar_dense.default]
