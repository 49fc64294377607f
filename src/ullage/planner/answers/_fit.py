"""The largest batch, sequence or other size of a workload whose best plan stays within a budget, and the fastest one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ullage._bytes import Size, format_bytes, format_seconds, parse_budget
from ullage._errors import ArgumentError, BudgetError, BudgetInfeasible, CaptureError, UllageError, WorkloadError
from ullage._progress import Progress, callback, shows_progress
from ullage._told import tells_of
from ullage.measure._state import leaves_rng
from ullage.planner.decide._planner import decide
from ullage.planner.model._model import model_of
from ullage.planner.plan._budget import Budget
from ullage.planner.plan._plan import Plan
from ullage.planner.study._prepare import prepare
from ullage.planner.study._study import Study
from ullage.planner.study._tiers import TierRequest, choose_tier
from ullage.solver._solve import smallest
from ullage.workload import Reads, Workload, check_axis, reading

STEPS = {"batch": 1, "seq": 128}  # kernels tile a sequence by 128 or a divisor of it
MOST = {"batch": 2**16, "seq": 2**20}  # far above any model's use, so that doubling ends: 16 and 13 doublings
MOST_STEPS = 1024  # of any other axis: 10 doublings


class Tried(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One value that `fit` planned for.

    Attributes:
        value: the axis's value.
        fits: whether a plan fits the budget.
        peak_bytes: bytes of the best plan or, if none fits, the smallest that any plan reaches; None if the step can't be run.
        step_seconds: seconds of the best plan; None if none fits.
        throughput: samples or tokens per second; None if none fits.
        reason: why none fits, or "".
    """

    value: int
    fits: bool
    peak_bytes: int | None
    step_seconds: float | None
    throughput: float | None
    reason: str


class Fit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The largest value that fits, and the tried one with the highest throughput; each with its plan.

    Attributes:
        axis: the keyword whose value was sought.
        step: values are multiples of it; `value + step` was tried and does not fit, unless `bound_by` says otherwise.
        unit: of throughputs: "tokens/s" along seq (samples times the value), else "samples/s".
        budget_bytes: bytes.
        device: name of the device.
        estimate: whether that device is not here.
        costs: "measured" or "roofline".
        value: the largest value that fits.
        throughput: its throughput.
        plan: its plan.
        fastest: the tried value with the highest throughput.
        fastest_throughput: its throughput.
        fastest_plan: its plan.
        bound_by: the reason that no larger value fits: "the budget", "at_most=N", or why a larger one can't be run.
        tried: every value that was planned for, in order.
    """

    axis: str
    step: int
    unit: str
    budget_bytes: int
    device: str
    estimate: bool
    costs: str
    value: int
    throughput: float
    plan: Plan
    fastest: int
    fastest_throughput: float
    fastest_plan: Plan
    bound_by: str
    tried: list[Tried]

    def __str__(self) -> str:
        label = ", an ESTIMATE: this device is not here" if self.estimate else ""
        lines = [
            f"fit of {self.axis} (multiples of {self.step}) within {format_bytes(self.budget_bytes)} on {self.device}{label} "
            f"(costs: {self.costs})",
            *([str(self.plan.setup)] if self.plan.setup is not None else []),
            f"  largest  {self._said(self.value, self.throughput, self.plan)}",
            f"  fastest  {self._said(self.fastest, self.fastest_throughput, self.fastest_plan)}",
            f"  bound by {self.bound_by}",
            f"  {'tried':>9}  {'peak':>12}  {'step time':>10}  {self.unit:>12}",
        ]
        for t in self.tried:
            peak = "" if t.peak_bytes is None else format_bytes(t.peak_bytes)
            seconds = "" if t.step_seconds is None else format_seconds(t.step_seconds)
            rate = "" if t.throughput is None else f"{t.throughput:,.1f}"
            lines.append(f"  {t.value:>9}  {peak:>12}  {seconds:>10}  {rate:>12}  {t.reason}".rstrip())
        return "\n".join(lines)

    def _said(self, value: int, throughput: float, plan: Plan) -> str:
        p = plan.predicted
        time = format_seconds(p.step_seconds)
        return f"{self.axis}={value}: {throughput:,.1f} {self.unit}, peak {format_bytes(p.peak_bytes)}, step {time}, {plan.kinds}"


class _Search:
    """Tries values and remembers the results."""

    def __init__(
        self,
        make: Callable[..., Workload],
        axis: str,
        budget: Size,
        request: TierRequest,
        given: dict[str, Any],
        reads: Reads,
    ) -> None:
        self.reads = reads
        self.make, self.axis, self.budget, self.request, self.given = make, axis, budget, request, given
        self.say: Callable[[str], None] = given.pop("progress") or (lambda _: None)
        self.tried: dict[int, Tried] = {}
        self.plans: dict[int, Plan] = {}
        self.least: dict[int, int] = {}  # by value, the smallest peak of any plan, if known
        self.study: Study | None = None  # the study of the largest value that fits

    def fits(self, value: int) -> bool:
        """Plan for a value. A value that can't be run counts as one over the budget, once a smaller value could be run."""
        try:
            found = self._plan(value)
        except (WorkloadError, CaptureError) as error:
            if not self.plans:
                raise
            found = Tried(
                value=value, fits=False, peak_bytes=None, step_seconds=None, throughput=None, reason=str(error)
            )
        self.tried[value] = found
        return found.fits

    def _plan(self, value: int) -> Tried:
        self.say(f"{self.axis}={value}")
        work = self._made(value)
        if "tier" not in self.given:  # measured once
            self.given["tier"] = choose_tier(self.request, work, self.given["device"], self.say)
        s = prepare(work, progress=lambda text: self.say(f"{self.axis}={value}: {text}"), **self.given)
        budget = Budget(self.budget.resolve(0, s.device.memory_bytes))
        try:
            plan = decide(s, budget)
        except BudgetInfeasible as error:
            if not self.plans:
                said = f"{self.axis}={value}, the smallest value tried, does not fit: {error}"
                raise BudgetInfeasible(said, budget.total, error.smallest_bytes, error.bound_by) from error
            self.least[value] = least = error.smallest_bytes
            return Tried(
                value=value, fits=False, peak_bytes=least, step_seconds=None, throughput=None, reason="over the budget"
            )
        self.study, self.plans[value], inst = s, plan, s.plain_session.inst
        p, units = plan.predicted, inst.samples * inst.accumulate * (value if self.axis == "seq" else 1)
        rate = units / p.step_seconds
        return Tried(
            value=value, fits=True, peak_bytes=p.peak_bytes, step_seconds=p.step_seconds, throughput=rate, reason=""
        )

    def _made(self, value: int) -> Workload:
        try:
            work = self.make(**{self.axis: value})
        except UllageError:
            raise  # it names the cause better than the error below
        except Exception as error:
            raise WorkloadError(f"make_work({self.axis}={value}) raised {type(error).__name__}: {error}") from error
        if not isinstance(work, Workload):
            raise ArgumentError(f"make_work: expected it to return a ullage.Workload, got {type(work).__name__}")
        return reading(work, self.reads.values, self.reads.assume)

    def largest(self, first: int, last: int, step: int) -> tuple[int, str]:
        """Return the largest value that fits, and the reason that no larger one does: double, then close the gap.

        Peaks grow about linearly with a batch or a sequence, so a straight line through the smallest peaks at both ends
        mostly finds the value at once. After two misses on the same side (a peak that grows faster), the gap is halved.
        """
        low = high = first
        while self.fits(high):
            if high == last:
                return last, f"at_most={last}"
            low, high = high, min(2 * high, last)
        sides: list[bool] = []
        while high - low > step:
            n = (high - low) // step
            at = n // 2
            if high in self.least and not (len(sides) > 1 and sides[-1] == sides[-2]):
                limit, a, b = self.tried_limit, self._least_of(low), self.least[high]
                at = int(n * (limit - a) / max(b - a, 1))
            value = low + min(max(at, 1), n - 1) * step
            sides.append(self.fits(value))
            low, high = (value, high) if sides[-1] else (low, value)
        reason = self.tried[high].reason
        return low, "the budget" if high in self.least else reason

    @property
    def tried_limit(self) -> int:
        assert self.study is not None
        return self.budget.resolve(0, self.study.device.memory_bytes)

    def _least_of(self, value: int) -> int:
        """Return the smallest peak of the largest value that fits, by the solver's model."""
        if value not in self.least:
            assert self.study is not None
            self.least[value] = smallest(model_of(self.study)).peak_bytes
        return self.least[value]


@shows_progress
@tells_of(CaptureError)
@leaves_rng
def fit(
    make_work: Callable[..., Workload],
    budget: int | str,
    axis: str = "batch",
    *,
    device: str | None = None,
    costs: str = "auto",
    units: Sequence[str] | None = None,
    step: int | None = None,
    at_least: int | None = None,
    at_most: int | None = None,
    disk_directory: str | Path | None = None,
    disk_budget: int | str | None = None,
    host_budget: int | str | None = None,
    checksums: bool = False,
    values: str = "auto",
    assume: Mapping[str, float] | None = None,
    progress: Progress = None,
) -> Fit:
    """Find the largest value of `axis` that fits the budget with its best plan, and the tried one that is fastest.

    Values are doubled from the smallest until one does not fit; then the gap is closed. Each is captured once and
    planned for as `plan` does it, so the answer's plan is confirmed, and the next value was tried and does not fit.
    Between the two it is assumed, not tried, that what fits at a value fits at every smaller one. A value that can't be
    run (more positions than the model has) counts as one that does not fit.

    Args:
        make_work: called with `axis` as its only keyword; returns a workload. For models that are larger than this
            machine it has to return `Workload.from_factory(...)`.
        budget: see `plan`; not a share of the plain step, whose peak differs at each value.
        axis: "batch", "seq" or any other keyword that takes a whole number.
        device: see `plan`, as for `costs` and `units`.
        costs: "auto" or "roofline".
        units: FQN globs of the modules to plan over.
        step: only multiples of it are tried; default: 1, along seq 128.
        at_least: the smallest value to try; default: `step`.
        at_most: the largest; default: 65,536 for batch, 1,048,576 for seq, else 1,024 steps.
        disk_directory: where saved tensors may be offloaded to, see `plan`.
        disk_budget: bytes or a string: size of the file that is made there.
        host_budget: bytes or a string: pinned host memory, instead of a disk.
        checksums: see `plan`, as for `values` and `assume`.
        values: "auto", "assumed" or "run".
        assume: what to take for values that depend on activations.
        progress: called with a line at each stage; None shows one on a terminal after 2 s, False nothing.

    Raises:
        ArgumentError: no such axis, a number that is not a whole one above zero, or a tier that is only half named.
        BudgetError: the budget can't be read.
        BudgetInfeasible: the smallest value does not fit.
        CaptureError, WorkloadError, DeviceError, OffloadError: as `plan`, at the smallest value.
    """
    progress = callback(progress)
    check_axis(make_work, axis)
    for name, given in (("step", step), ("at_least", at_least), ("at_most", at_most)):
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise ArgumentError(f"{name}={given!r}: expected a whole number of 1 or more")
    wanted = parse_budget(budget)
    if wanted.of == "plain":
        raise BudgetError(
            f"budget={budget!r}: the plain step is another one at each {axis}; give bytes or '% of device'"
        )
    step = step or STEPS.get(axis, 1)
    first = -(-(at_least or step) // step) * step
    last = (at_most or MOST.get(axis, MOST_STEPS * step)) // step * step
    if first > last:
        raise ArgumentError(f"{axis}: no multiple of step={step} lies from {at_least or step} to {at_most}")
    alike = {"device": device, "costs": costs, "units": units, "progress": progress}
    search = _Search(
        make_work,
        axis,
        wanted,
        TierRequest(disk_directory, disk_budget, host_budget, checksums=checksums),
        alike,
        Reads(values, assume or {}),
    )
    value, bound_by = search.largest(first, last, step)
    rates = {v: t.throughput for v, t in sorted(search.tried.items()) if t.throughput is not None}
    fastest = max(rates, key=lambda v: rates[v])
    plan = search.plans[value]
    return Fit(
        axis=axis,
        step=step,
        unit="tokens/s" if axis == "seq" else "samples/s",
        budget_bytes=search.tried_limit,
        device=plan.device,
        estimate=plan.estimate,
        costs=plan.costs,
        value=value,
        throughput=rates[value],
        plan=plan,
        fastest=fastest,
        fastest_throughput=rates[fastest],
        fastest_plan=search.plans[fastest],
        bound_by=bound_by,
        tried=[search.tried[v] for v in sorted(search.tried)],
    )
