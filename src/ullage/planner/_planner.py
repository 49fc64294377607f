"""From a workload and a budget to a plan: capture, solve, confirm by executing on fake tensors, tighten, relax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ullage._bytes import format_bytes, parse_budget
from ullage._errors import BudgetError, BudgetInfeasible
from ullage.measure._state import leaves_rng
from ullage.mechanisms import KEEP, Option
from ullage.planner._model import StepModel, build_model
from ullage.planner._plan import VERSION, Decision, Forecast, Plan, environment, fingerprint
from ullage.planner._policies import check_policy, policy_assignment
from ullage.planner._profile import Profile, peak_moment
from ullage.planner._solve import Solution, smallest, solve
from ullage.planner._study import StepCapture, Study, capture_options, count_recomputed, study
from ullage.workload import Workload

MAX_TIGHTENINGS = 10
HEADROOM = 1024  # bytes below the budget: a few scalars are allocated where no dispatch mode sees them
RELAX_WORK = 100_000  # ops executed on fake tensors while trying to relax single units


@leaves_rng
def plan(
    work: Workload,
    budget: int | str | None = None,
    device: str | None = None,
    policy: str = "optimal",
    *,
    costs: str = "auto",
    profile: Profile | None = None,
    units: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Decide per unit what to keep, recompute or select so that the step's peak stays within `budget`.

    Args:
        work: what is trained; left as found.
        budget: bytes or a string (see `ullage.parse_budget`); may be None for a named policy.
        device: None (where the model is) or a name of the device table; one that is not here makes it an estimate.
        policy: "optimal" or a named policy.
        costs: "auto" (ops are timed here) or "roofline" (nothing is run, same on any machine).
        profile: take op costs from this profile instead of measuring again.
        units: FQN globs of the modules to plan over, instead of the blocks the architecture shows.
        progress: called with a line at each stage.

    Raises:
        BudgetError: the budget can't be read. BudgetInfeasible: no plan fits it.
        ArgumentError, CaptureError, WorkloadError, DeviceError: see their docstrings.
    """
    check_policy(policy)
    wanted = parse_budget(budget) if budget is not None else None
    if wanted is None and policy == "optimal":
        raise BudgetError("budget: policy 'optimal' needs one; or name a policy, such as policy='every_block'")
    known = profile.op_costs if profile is not None else None
    mode = profile.costs if profile is not None and profile.costs == "roofline" else costs
    s = study(work, device, mode, units, known, progress)
    plain = s.captures["keep"]
    baseline = _forecast(s, StepCapture(plain.session, s.plain_steps[0], {}), plain)
    limit = wanted.resolve(baseline.peak_bytes, s.device.memory_bytes) if wanted is not None else None
    bound = 0.0
    if policy != "optimal":
        assignment = policy_assignment(policy, s.units, s.options)
        if limit is not None and _executed_peak(s, assignment) > limit:
            raise _infeasible(
                s, limit, _smallest(s)[1], f"policy {policy} peaks at {format_bytes(_executed_peak(s, assignment))}; "
            )
    elif limit is not None and baseline.peak_bytes <= limit:
        assignment = {u.fqn: KEEP for u in s.units}
    else:
        assert limit is not None
        assignment, bound = _optimal(s, limit, baseline)
    return _finish(s, assignment, limit, policy, baseline, bound, work)


def _executed_peak(s: Study, assignment: Mapping[str, Option]) -> int:
    return max(s.peak(c) for c in s.execute_fresh(assignment))


def _assignment(model: StepModel, solution: Solution) -> dict[str, Option]:
    return {f: model.options[u][c].option for u, (f, c) in enumerate(zip(model.units, solution.choice, strict=True))}


def _smallest(s: Study) -> tuple[dict[str, Option], StepCapture]:
    """The assignment of the smallest executed peak, among the solver's and the homogeneous ones."""
    capture_options(s)
    model = build_model(s)
    candidates = [s.execute(_assignment(model, smallest(model)))]
    candidates += [c for n, c in s.captures.items() if n != "keep"]
    candidates.append(s.execute(policy_assignment("every_block", s.units, s.options)))
    best = min(candidates, key=s.peak)
    return {u.fqn: best.assignment.get(u.fqn, KEEP) for u in s.units}, best


def _infeasible(s: Study, limit: int, best: StepCapture, why: str = "") -> BudgetInfeasible:
    phase, module, op = peak_moment(s, best)
    first = StepCapture(s.captures["keep"].session, s.plain_steps[0], {})
    size = max(s.peak(best), _optimizer_peak(s, first)) + HEADROOM
    return BudgetInfeasible(
        f"budget {format_bytes(limit)}: {why}the smallest peak any plan reaches is {format_bytes(size)} ({size} bytes), "
        f"bound by {phase} in {module or '(root)'} at {op}",
        limit,
        size,
        (phase, module, op),
    )


def _optimizer_peak(s: Study, capture: StepCapture) -> int:
    """The first step's optimizer part: state is created there, whatever the plan."""
    t, trace = s.timeline(capture.session), capture.session.trace
    ops = [i for i in range(capture.ops.start, capture.ops.stop) if trace.phase[i] == "optimizer"]
    return max((int(t.peak[i]) for i in ops), default=0) + s.device.facts.blas_workspace_bytes


def _optimal(s: Study, limit: int, baseline: Forecast) -> tuple[dict[str, Option], float]:
    first = StepCapture(s.captures["keep"].session, s.plain_steps[0], {})
    capture_options(s)
    model = build_model(s)
    floor = _optimizer_peak(s, first)
    limit -= HEADROOM
    target, chosen, bound = limit, None, None
    for _ in range(MAX_TIGHTENINGS):
        solution = solve(model, target)
        if solution is None:
            break
        bound = solution.lower_bound if bound is None else bound
        assignment = _assignment(model, solution)
        s.progress("confirming the plan")
        over = max(_executed_peak(s, assignment), floor) - limit
        if over <= 0:
            chosen = assignment
            break
        target -= over
    if chosen is None:
        chosen, best = _smallest(s)
        if max(s.peak(best), _executed_peak(s, chosen), floor) > limit:
            raise _infeasible(s, limit + HEADROOM, best)
        bound = 0.0 if bound is None else bound
    return _relax(s, model, chosen, limit), baseline.step_seconds + (bound or 0.0)


def _relax(s: Study, model: StepModel, assignment: dict[str, Option], limit: int) -> dict[str, Option]:
    """Try each unit's next cheaper option by executing it; keep what still fits. The most seconds first."""
    work = RELAX_WORK
    rejected: set[tuple[str, str]] = set()
    while work > 0:
        tries = []
        for u, fqn in enumerate(model.units):
            facts = model.options[u]
            at = next((i for i, o in enumerate(facts) if o.option == assignment[fqn]), None)
            if at is None or at == 0 or (fqn, facts[at - 1].option.name) in rejected:
                continue
            choice = [
                next((i for i, o in enumerate(f) if o.option == assignment[n]), 0)
                for n, f in zip(model.units, model.options, strict=True)
            ]
            choice[u] = at - 1
            if model.peak(choice) <= limit * 1.03:
                tries.append((facts[at - 1].seconds - facts[at].seconds, u, facts[at - 1].option))
        if not tries:
            break
        _, u, option = min(tries, key=lambda t: (t[0], t[1]))
        trial = {**assignment, model.units[u]: option}
        s.progress("trying to relax single units")
        captures = s.execute_fresh(trial)
        work -= sum(c.ops.stop - c.ops.start for c in captures)
        if max(s.peak(c) for c in captures) <= limit:
            assignment = trial
            rejected.clear()
        else:
            rejected.add((model.units[u], option.name))
    return assignment


def _forecast(s: Study, first: StepCapture, later: StepCapture) -> Forecast:
    peaks = s.peak(first), s.peak(later)
    phase, module, op = peak_moment(s, first if peaks[0] > peaks[1] else later)
    return Forecast(
        peak_bytes=max(peaks),
        step_seconds=s.seconds(later),
        first_step_peak_bytes=peaks[0],
        later_step_peak_bytes=peaks[1],
        phase=phase,
        module=module,
        op=op,
    )


def _finish(
    s: Study,
    assignment: dict[str, Option],
    limit: int | None,
    policy: str,
    baseline: Forecast,
    bound: float,
    work: Workload,
) -> Plan:
    if all(o == KEEP for o in assignment.values()):  # the plain step was captured already
        first, later = StepCapture(s.captures["keep"].session, s.plain_steps[0], {}), s.captures["keep"]
    else:
        first, later = s.execute_fresh(assignment)
    predicted = _forecast(s, first, later)
    recomputed = count_recomputed(first)
    facts = build_model(s) if len(s.captures) > 1 else None
    rows = []
    for index, u in enumerate(s.units):
        option = assignment[u.fqn]
        known = {o.option: o for o in facts.options[index]} if facts else {}
        keep, mine = known.get(KEEP), known.get(option)
        freed = max((keep.held_bytes if keep else u.saved_bytes) - (mine.held_bytes if mine else 0), 0)
        shape = max((c for c in first.session.calls if c.fqn == u.fqn), key=lambda c: _elements(c.shapes), default=None)
        rows.append(
            Decision(
                unit=u.fqn,
                action=option.name,
                bytes_freed=0 if option == KEEP else freed,
                seconds_added=0.0 if option == KEEP or mine is None else mine.seconds,
                recomputed_ops=0 if option == KEEP else recomputed.get(u.fqn, 0),
                reason=u.keep_reason
                or (
                    "fits" if option == KEEP else "needed for the budget" if policy == "optimal" else f"policy {policy}"
                ),
                buffers=list(u.buffers),
                keeps_routing=u.routing,
                input_elements=_elements(shape.shapes) if shape else 0,
            )
        )
    bound = bound or (baseline.step_seconds if policy == "optimal" else 0.0)
    notes = list(s.session.values.assumptions)
    notes += sorted({f"{f}: no {o}: {why}" for (f, o), why in s.reasons.items() if o != "keep"})[:8]
    if s.device.estimate:
        notes.append(
            f"estimate for {s.device.facts.title}, margin {s.device.facts.margin:.0%}: its kernels were not run"
        )
    model = first.session.inst.model if work.factory is not None else work.model
    return Plan(
        version=VERSION,
        budget_bytes=limit,
        policy=policy,
        device=s.device.name,
        costs=s.costs_mode,
        estimate=s.device.estimate,
        predicted=predicted,
        baseline=baseline,
        lower_bound_seconds=min(bound, predicted.step_seconds),
        gap=max(predicted.step_seconds / bound - 1, 0.0) if bound else 0.0,
        decisions=rows,
        shapes={u.fqn: list(u_shape) for u in s.units for u_shape in _first_shape(first, u.fqn)},
        model=fingerprint(model),
        notes=notes,
        environment=environment(),
    )


def _elements(shapes: tuple[tuple[int, ...], ...]) -> int:
    total = 0
    for shape in shapes:
        n = 1
        for d in shape:
            n *= d
        total += n
    return total


def _first_shape(capture: StepCapture, fqn: str) -> list[tuple[int, ...]]:
    return next(([c.shapes[0]] for c in capture.session.calls if c.fqn == fqn and c.shapes), [])
