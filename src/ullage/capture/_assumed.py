"""Values that depend on activations and that a step reads all the same: `loss.item()` for a log, a norm, the size of a mask.

A number is made up and noted, and the step is captured again with other numbers. If it runs the same ops, the number does not steer
it. Sizes are assumed only where that was asked for. With a `Recording` of real steps their values are taken instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ullage._errors import CaptureError
from ullage._source import source_line
from ullage.capture._op_values import NUMPY
from ullage.capture._trace import tensors_of
from ullage.runtime import Apart, is_recomputing
from ullage.workload import Reads

if TYPE_CHECKING:
    from ullage.capture._recorded import Recording, Taken

MOST_BYTES = 1 << 26  # a larger array is refused rather than made up. Not tuned
_SHOWN = 4  # values per line that a profile shows


class Read(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A place where the step reads what depends on activations.

    Attributes:
        line: `folder/file.py:line` of the code that asks, or what runs there.
        module: fully qualified name of the module that runs; "" outside of every module.
        what: the op.
        taken: the values or sizes that were taken, the first of them.
        how: "assumed", "given" (by `assume=`) or "run" (of real steps).
    """

    line: str
    module: str
    what: str
    taken: str
    how: str


@dataclass(frozen=True)
class Taking:
    """Where the values of a session come from.

    Attributes:
        reads: the user's choice of `values` and `assume`.
        sizes: whether sizes may be assumed, too.
        mask: the share of elements that a mask is assumed to select.
        recording: values of real steps, taken instead of assumptions.
    """

    reads: Reads = field(default_factory=Reads)
    sizes: bool = False
    mask: float = 1.0
    recording: Recording | None = None


class Assumed:
    """Gives values that a step reads. A plan uses those of `trial` 0, and the captures of the others are compared with it."""

    # the last one only where several values are read: their signs and truth alternate the other way round
    TRIALS = (1, 2, 3)

    def __init__(self, trial: int, notes: dict[str, None], taking: Taking) -> None:
        self.trial, self._notes, self.taking = trial, notes, taking
        self.read: dict[str, None] = {}  # lines that read a value that was made up
        self.module: Callable[[], str] = lambda: ""
        self._shown: dict[tuple[str, str, str, str], list[str]] = {}
        self._count = 0
        self._step = -1
        self.position: dict[tuple[str, str], int] = {}  # by line and op, how many reads of this step were served

    @property
    def reads(self) -> list[Read]:
        """The reads so far, each place once."""
        return [
            Read(
                line=line,
                module=m,
                what=what,
                how=how,
                taken=", ".join(v[:_SHOWN]) + (", ..." if len(v) > _SHOWN else ""),
            )
            for (line, m, what, how), v in self._shown.items()
        ]

    def begin(self) -> None:
        """A step begins: its reads are served from the first on."""
        self._step += 1
        self.position = {}

    def unused(self) -> list[str]:
        """Return the lines that `assume=` names and that have read nothing."""
        lines = [line for line, *_, how in self._shown if how == "given"]
        return [k for k in self.taking.reads.assume if ":" in k and not any(Reads(assume={k: 1}).at(x) for x in lines)]

    def recorded(self, what: str, place: Callable[[], str], known: bool) -> Taken | None:
        """Return the values that a real step has read at this place; None if there is no recording, or nothing more in it.

        Args:
            what: the op.
            place: says the line that asks, or in backward the one whose gradient is computed.
            known: the values do not depend on activations, so only the place in the recording moves on.
        """
        if self.taking.recording is None:
            return None
        key = source_line(), what
        at = self.position[key] = self.position.get(key, -1) + 1
        if known:
            return None
        taken = self.taking.recording.find(self._step, key, at)
        where = place()
        if taken is None:
            read = len(self.taking.recording.read(self._step, key))
            self._notes[f"{where}: a real step read {read or 'no'} values there, so the rest is assumed"] = None
            return None
        if taken.shown:
            self._show(where, what, taken.shown, "run")
            self._notes[
                f"{where}: a size that depends on activations; that of a real step was taken, the promise is for it, and others may need more memory"
                if taken.outputs
                else f"{where}: a value that depends on activations; that of a real step was taken"
            ] = None
        return taken

    def given(self, kind: str | None, where: str) -> float | None:
        """Return what `assume=` says of a read: of its line, or else of its kind ("mask", "unique"; None for a number)."""
        by_line = self.taking.reads.at(where)
        return by_line if by_line is not None or kind is None else self.taking.reads.assume.get(kind)

    def scalar(self, dtype: torch.dtype, where: str) -> bool | int | float | complex:
        """Return a value for a tensor of one element."""
        value: bool | int | float | complex
        given = self.given(None, where)
        if given is not None:
            value = _as(dtype, given)
            self._show(where, "item", str(value), "given")
            self._notes[f"{where}: the value read there is assumed to be {value}, as given"] = None
            return value
        if dtype is torch.bool:
            from ullage.capture._checks import value_that_passes

            passes = value_that_passes()
            if passes is not None:
                self._show(where, "item", str(passes), "assumed")
                self._notes[f"{where}: a check of values, which raises if it fails; it is taken to pass"] = None
                return passes
        self._note(where)
        k = self._count
        if dtype is torch.bool:
            value = (False, True, k % 2 == 0, k % 2 == 1)[self.trial]
        elif not dtype.is_floating_point and not dtype.is_complex:
            value = (1, 3 + k % 3, 0, 5 * (k % 2))[self.trial]
        else:  # no two alike, for steps that compare them
            value = _as(dtype, (1.0, 100.0 + k, -100.0 - k, (100.0 + k) * (-1.0) ** k)[self.trial])
        self._show(where, "item", str(value), "assumed")
        return value

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
        self._show(where, NUMPY, "1", "assumed")
        kind = torch.zeros((), dtype=tensor.dtype).numpy().dtype
        if self.trial == 0:
            return np.ones(tuple(tensor.shape), kind)
        ramp = np.arange(tensor.numel()).reshape(tuple(tensor.shape))
        if kind == np.bool_:
            return np.asarray(ramp % 2 == self.trial % 2)
        values = ramp % 5 if np.issubdtype(kind, np.integer) else (-100 - ramp if self.trial == 2 else ramp + 100)
        return np.asarray(values, kind)

    def chosen(self, what: str, kind: str, numel: int, where: str) -> int | None:
        """Return how many of so many elements an op takes; None if sizes are not to be assumed.

        Args:
            what: the op.
            kind: "mask" or "unique".
            numel: the number of elements.
            where: the line that asks.
        """
        given = self.given(kind, where)
        if given is None and not self.taking.sizes:
            return None
        share = given if given is not None else self.taking.mask if kind == "mask" else 1.0
        count = min(round(share * numel) if share <= 1 else int(share), numel)
        self._show(where, what, f"{count} of {numel}", "assumed" if given is None else "given")
        bound = ", which is a bound" if share == 1 else ", the share in the batch's own masks" if given is None else ""
        self._notes[
            f"{where}: a size that depends on activations; {kind} is assumed to take {count} of {numel} elements{bound}; "
            f"with others the step may need more or less memory (assume={{'{kind}': share}})"
        ] = None
        return count

    def size(self, what: str, where: str) -> int | None:
        """Return the size that `assume=` gives for a line; None if it gives none."""
        given = self.given(None, where)
        if given is None:
            return None
        self._show(where, what, str(int(given)), "given")
        self._notes[f"{where}: a size that depends on activations; it is assumed to be {int(given)}, as given"] = None
        return int(given)

    def _show(self, where: str, what: str, value: str, how: str) -> None:
        if is_recomputing():  # its forward was noted
            return
        shown = self._shown.setdefault((where, self.module(), what, how), [])
        if value not in shown and len(shown) <= _SHOWN:
            shown.append(value)

    def _note(self, where: str) -> None:
        self._count += 1
        if where not in self.read:
            self.read[where] = None
            self._notes[_same_ops(where)] = None

    def steer(self) -> None:
        """Say that the values made up steer the step, instead of that they do not."""
        for where in self.read:
            self._notes.pop(_same_ops(where), None)
        self._notes[
            f"{', '.join(self.read)}: values that depend on activations are read there and steer the step; they were taken to be 1, and with "
            "others the step does other ops, of which nothing is promised; values='run' takes those of a real step, "
            "assume={'file.py:line': number} a number of yours"
        ] = None


def _same_ops(where: str) -> str:
    return (
        f"{where}: reads a value that depends on activations; it was taken to be 1, and the step does the same ops "
        "where it is 100 or -100"
    )


def _as(dtype: torch.dtype, value: float) -> bool | int | float | complex:
    if dtype is torch.bool:
        return bool(value)
    if dtype.is_complex:
        return complex(value, 0.0)
    return float(value) if dtype.is_floating_point else int(value)


class Position(Apart):
    """Where in the recording a unit's call began: its replay reads the same values again."""

    def __init__(self, assumed: Assumed) -> None:
        self.assumed, self._start = assumed, dict[tuple[str, str], int]()
        self._begun = False

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Around the call's forward, and around each replay."""
        if not is_recomputing() or not self._begun:
            self._begun, self._start = True, dict(self.assumed.position)
            yield
            return
        now, self.assumed.position = self.assumed.position, dict(self._start)
        try:
            yield
        finally:
            self.assumed.position = now


def steers(session: Any, another: Callable[[int], Any], steps: int) -> bool:
    """Capture the steps of a session again, with other values in place of those that it made up. Do its ops depend on them?

    Args:
        session: a session that has run `steps` plain steps.
        another: makes a session of the same workload for a trial.
        steps: number of steps.
    """
    if not session.values.assumed.read:
        return False
    for trial in Assumed.TRIALS if len(session.values.assumed.read) > 1 else Assumed.TRIALS[:2]:
        other = another(trial)
        try:
            other.run(steps=steps)
        except CaptureError as error:
            if error.__cause__ is None or not other.raised_on_purpose:
                return True
            session.values.assumptions[f"a check of values raised for others than 1 ({error}); taken to pass"] = None
            continue
        if _ops(session) != _ops(other):
            return True
    return False


def _ops(session: Any) -> list[Any]:
    """Return the ops that ran, without reads, and without the numbers among their arguments, which may be made-up values."""
    kinds = [(s.func, tensors_of((s.args, s.kwargs)), s.outputs) for s in session.signatures]
    ran = [(kinds[i], phase) for i, phase in zip(session.trace.signature, session.trace.phase, strict=True)]
    return [op for op in ran if op[0][0] is not torch.ops.aten._local_scalar_dense.default]
