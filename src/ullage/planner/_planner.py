"""From a workload and a budget to a plan: capture, solve, confirm by executing on fake tensors, tighten, relax."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from msgspec import structs

from ullage._bytes import format_bytes, parse_budget
from ullage._errors import ArgumentError, BudgetError, BudgetInfeasible
from ullage.apply import Report
from ullage.measure._state import leaves_rng
from ullage.mechanisms import KEEP, Option
from ullage.planner._finish import finish, forecast, too_much_offloaded
from ullage.planner._instance import StepModel
from ullage.planner._links import assignment_of
from ullage.planner._live import peak_moment
from ullage.planner._model import model_of
from ullage.planner._options import find_options
from ullage.planner._overrides import Overrides, Restriction
from ullage.planner._peak import bounds_of
from ullage.planner._plan import Forecast, Plan
from ullage.planner._policies import check_policy, policy_assignment
from ullage.planner._profile import Profile
from ullage.planner._schedule import Schedule, flat
from ullage.planner._simple import fewer_actions
from ullage.planner._solve import Solution, smallest
from ullage.planner._solve import solve as solve_anew
from ullage.planner._study import StepCapture, Study, key_of, study
from ullage.planner._tiers import OffloadTier, TierRequest, choose_tier
from ullage.planner._window import choose_window
from ullage.planner._with_tier import solve_with_tier, without_tier
from ullage.workload import Workload

MAX_TIGHTENINGS = 10
RELAX_WORK = 100_000  # ops executed on fake tensors while trying to relax single units
SLACK_BYTES = 4096  # the model may be off by this much without having been seen to be

solve = lru_cache(maxsize=4)(solve_anew)  # `execute_choice` and `decide` ask for the same
with_tier = lru_cache(maxsize=4)(solve_with_tier)


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
    pin: Mapping[str, str] | None = None,
    forbid: Collection[str] = (),
    headroom: int | str | None = None,
    simple: bool | float = False,
    disk_directory: str | Path | None = None,
    disk_budget: int | str | None = None,
    host_budget: int | str | None = None,
    feedback: Report | None = None,
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
        pin: actions ("keep", "recompute", "select", "select:LEVEL") by FQN glob of units; any policy obeys, and the plan says
            what each costs.
        forbid: actions that no unit gets, unless it is pinned to one.
        headroom: bytes or a string, as for `budget`: left free of the budget.
        simple: True: of the plans within 1 % of the best step time, one with the fewest distinct actions; or that share.
        disk_directory: where saved tensors may go, an existing directory on this machine, whose speed is measured. From a CUDA
            device that is here too, not from one that is estimated.
        disk_budget: bytes or a string: of a file that is made there while the plan is applied.
        host_budget: bytes or a string: of pinned host memory that saved tensors of a CUDA device may go to; of these the
            plan takes what it needs. Either this or a disk.
        feedback: what `Handle.report()` of an earlier plan with this tier said: transfers are taken to be as much slower
            than measured as that plan's steps had to wait longer than was predicted.
        progress: called with a line at each stage.

    Raises:
        BudgetError: the budget or the headroom can't be read. BudgetInfeasible: no plan fits it.
        ArgumentError, CaptureError, WorkloadError, DeviceError: see their docstrings.
    """
    overrides, tier = (
        Overrides(pin or {}, forbid, headroom, simple),
        TierRequest(disk_directory, disk_budget, host_budget, feedback),
    )
    return study_and_plan(work, budget, device, policy, costs, profile, units, overrides, tier, progress)[1]


@leaves_rng
def study_and_plan(
    work: Workload,
    budget: int | str | None,
    device: str | None = None,
    policy: str = "optimal",
    costs: str = "auto",
    profile: Profile | None = None,
    units: Sequence[str] | None = None,
    overrides: Overrides | None = None,
    tier: TierRequest | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Study, Plan]:
    """`plan`, and the study it comes from: for who shows more of the step than the plan does."""
    check_policy(policy)
    overrides, tier = overrides or Overrides(), tier or TierRequest()
    sends = "policy 'offload'" if policy == "offload" else overrides.needs_tier
    if sends and not tier.given:
        raise ArgumentError(
            f"{sends}: has tensors leave memory, and neither disk_directory with disk_budget nor host_budget says where to"
        )
    overrides.check(policy, budget is not None)
    wanted = parse_budget(budget) if budget is not None else None
    if wanted is None and policy == "optimal":
        raise BudgetError("budget: policy 'optimal' needs one; or name a policy, such as policy='every_block'")
    chosen = choose_tier(tier, work, device, progress)
    if chosen is not None:
        overrides.check_tier(chosen.name)
    s = prepare(work, device, costs, profile, units, progress, chosen)
    s.explains = True
    plain = _fresh_peak(s, {})
    limit = wanted.resolve(plain, s.device.memory_bytes) if wanted is not None else None
    s.headroom_bytes = overrides.headroom_bytes(plain, s.device.memory_bytes)
    return s, decide(s, limit, policy, overrides.restrict(s, solver=limit is not None))


def prepare(
    work: Workload,
    device: str | None = None,
    costs: str = "auto",
    profile: Profile | None = None,
    units: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
    tier: OffloadTier | None = None,
) -> Study:
    """What all decisions about one workload share: the plain step and the options of its units."""
    known = profile.op_costs if profile is not None else None
    mode = profile.costs if profile is not None and profile.costs == "roofline" else costs
    s = study(work, device, mode, units, known, progress, tier)
    find_options(s)
    return s


def decide(s: Study, limit: int | None, policy: str = "optimal", restriction: Restriction | None = None) -> Plan:
    """Decide within `limit` bytes; as often as one likes on one study. A limit may be None for a named policy.

    Args:
        s: the study; its options are what is chosen from.
        limit: bytes.
        policy: "optimal" or a named one.
        restriction: the overrides that made these options what they are.

    Raises:
        BudgetInfeasible: no plan fits, or the named policy does not.
    """
    s.windows.clear()  # those of another limit
    baseline = forecast(s, *s.plain_capture)
    assignment, bound = _choose(s, limit, policy, baseline)
    if restriction is None:
        return finish(s, assignment, limit, policy, baseline, bound, {})
    windows = dict(s.windows)  # a solver that is asked for something else notes others
    pins = restriction.pin_costs(s, assignment, lambda: _unconfirmed(s, limit, policy, baseline))
    s.windows = windows
    notes = []
    if restriction.overrides.tolerance and limit is not None:
        room = limit - s.reserve_bytes
        assignment, note = fewer_actions(
            s, assignment, restriction.overrides.tolerance, room, lambda: _optimal(s, room)[0]
        )
        notes.append(note)
    made = finish(s, assignment, limit, policy, baseline, bound, restriction.why())
    forbidden = sorted(restriction.overrides.forbid)
    return structs.replace(made, pins=pins, forbidden=forbidden, notes=[*made.notes, *filter(None, notes)])


def _choose(s: Study, limit: int | None, policy: str, baseline: Forecast) -> tuple[dict[str, Option], float]:
    """The assignment, and a lower bound on the seconds of a step under any that fits; 0 for a named policy."""
    if policy != "optimal":
        assignment = policy_assignment(policy, s.units, s.options)
        peak = _fresh_peak(s, assignment)
        if limit is not None and peak > limit - s.reserve_bytes:
            raise _infeasible(s, limit, _smallest(s), f"policy {policy} peaks at {format_bytes(peak)}; ")
        # without a budget no more than the plain step takes
        choose_window(s, assignment, (baseline.peak_bytes if limit is None else limit) - s.reserve_bytes)
        return assignment, 0.0
    assert limit is not None
    if _plain_fits(s, limit, baseline):
        return {u.fqn: KEEP for u in s.units}, baseline.step_seconds
    assignment, added = _optimal(s, limit - s.reserve_bytes)
    return assignment, baseline.step_seconds + added


def _plain_fits(s: Study, limit: int, baseline: Forecast) -> bool:
    return baseline.peak_bytes <= limit - s.reserve_bytes and all(KEEP in o for o in s.options.values())


def _unconfirmed(s: Study, limit: int | None, policy: str, baseline: Forecast) -> dict[str, Option]:
    """What `_choose` would choose as the solver sees it."""
    if policy != "optimal":
        return policy_assignment(policy, s.units, s.options)
    assert limit is not None
    if _plain_fits(s, limit, baseline):
        return {u.fqn: KEEP for u in s.units}
    model = model_of(s)
    return _assignment(model, (_solution(s, limit - s.reserve_bytes) or smallest(model)).schedule)


def _solution(s: Study, target: int, offload: bool = True) -> Solution | None:
    """What the solver finds within `target` bytes; where tensors may leave, the window that goes with it is noted."""
    model = model_of(s)
    if s.tier is None or s.pace is None:
        return solve(model, target)
    if not offload:
        return solve(without_tier(model), target)
    found = with_tier(model, s.pace, target, s.tier)
    if found is None:
        return None
    s.windows[key_of(_assignment(model, found[0].schedule))] = found[1].window_bytes
    return found[0]


def smallest_bytes(s: Study) -> int:
    """The smallest budget that some plan is executed within."""
    return _fresh_peak(s, _smallest(s).assignment) + s.reserve_bytes


def execute_choice(s: Study, limit: int) -> None:
    """Execute afresh what the solver chooses within `limit`.

    `decide` would execute it twice, in passing and then afresh. It pays to do this first where the choice will most
    likely fit, and where executions made for another budget may be the same.
    """
    target = limit - s.reserve_bytes
    if _fresh_peak(s, {}) > target and (solution := _solution(s, target)) is not None:
        s.execute_fresh(_assignment(model_of(s), solution.schedule))


def _fresh_peak(s: Study, assignment: Mapping[str, Option]) -> int:
    return max(s.peak(c) for c in s.execute_fresh(assignment))


def _assignment(model: StepModel, schedule: Schedule) -> dict[str, Option]:
    return assignment_of(model.units, [[o.option for o in options] for options in model.options], schedule)


def _smallest(s: Study) -> StepCapture:
    """The executed step with the smallest peak, among the solver's choice and the homogeneous ones; without windows."""
    s.windows.clear()
    model = model_of(s)
    candidates = [c for n, c in s.captures.items() if n != "keep" and _allowed(s, c.assignment)]
    candidates.append(s.execute(_assignment(model, smallest(model).schedule)))
    if s.tier is not None:
        candidates.append(s.execute(_assignment(model, smallest(without_tier(model)).schedule)))
    candidates.append(s.execute(policy_assignment("every_block", s.units, s.options)))
    fitting = [c for c in candidates if s.fits_tier(c)]
    if not fitting:
        least = min(candidates, key=s.offloaded_bytes)
        raise too_much_offloaded(s, least, "with these pins")
    return min(fitting, key=s.peak_with_update)


def _allowed(s: Study, assignment: Mapping[str, Option]) -> bool:
    return all(replace(assignment.get(f, KEEP), place=None) in options for f, options in s.options.items())


def _infeasible(s: Study, limit: int, best: StepCapture, why: str = "") -> BudgetInfeasible:
    steps = s.execute_fresh(best.assignment)
    size = max(map(s.peak, steps)) + s.reserve_bytes
    phase, module, op = peak_moment(s, max(steps, key=s.peak))
    kept = Counter(u.keep_reason for u in s.units if u.keep_reason)
    reasons = "".join(f"; {n} units can only be kept: {reason}" for reason, n in kept.most_common(3))
    reasons += f"; {format_bytes(s.headroom_bytes)} of it are headroom" if s.headroom_bytes else ""
    reasons += f"; with {', '.join(s.restrictions)}" if s.restrictions else ""
    bounds = bounds_of(s, best.assignment, steps) if s.explains else None
    return BudgetInfeasible(
        f"budget {format_bytes(limit)}: {why}the smallest peak any plan reaches is {format_bytes(size)} ({size} bytes), "
        f"bound by {phase} in {module or '(root)'} at {op}{reasons}{bounds.hint if bounds is not None else ''}",
        limit,
        size,
        (phase, module, op),
        bounds,
    )


def _optimal(s: Study, limit: int) -> tuple[dict[str, Option], float]:
    """The assignment that is executed within `limit`, and a lower bound on the seconds any such one adds.

    What is simulated while choosing is coarser than what is then executed. So that offload never makes a step slower, a
    choice that sends something is compared with the best one that sends nothing.
    """
    confirmed, bound = _confirmed(s, limit, offload=True)
    found = [confirmed]
    if s.tier is not None and (confirmed is None or any(o.offloads for o in confirmed.assignment.values())):
        found.append(_confirmed(s, limit, offload=False)[0])
    chosen = [c for c in found if c is not None]
    if not chosen:
        chosen = [_smallest(s)]
        if _fresh_peak(s, chosen[0].assignment) > limit:
            raise _infeasible(s, limit + s.reserve_bytes, chosen[0])
    whole = [_whole(s, c, limit) for c in chosen]
    for assignment in whole:
        choose_window(s, assignment, limit)
    if len(whole) > 1:
        whole.sort(key=lambda a: s.seconds(s.execute_fresh(a)[1]))
    return whole[0], bound


def _confirmed(s: Study, limit: int, offload: bool) -> tuple[StepCapture | None, float]:
    """What the solver chooses and execution shows to fit, None if there is none; and its lower bound."""
    model, target, bound = model_of(s), limit, None
    for _ in range(MAX_TIGHTENINGS):
        solution = _solution(s, target, offload)
        if solution is None:
            break
        bound = solution.lower_bound if bound is None else bound
        trial = s.execute(_assignment(model, solution.schedule))
        s.progress("confirming the plan")
        over = s.peak_with_update(trial) - limit
        if not s.fits_tier(trial):  # the model says less than what is sent
            break
        if over <= 0 and (over := _fresh_peak(s, trial.assignment) - limit) <= 0:
            if not all(map(s.fits_tier, s.execute_fresh(trial.assignment))):
                break
            return trial, bound
        target = min(target - over, solution.peak_bytes - 1)  # not the same again
    return None, bound or 0.0


def _whole(s: Study, chosen: StepCapture, limit: int) -> dict[str, Option]:
    everything = {u.fqn: chosen.assignment.get(u.fqn, KEEP) for u in s.units}
    return _relax(s, everything, s.peak(chosen), limit)


def _relax(s: Study, assignment: dict[str, Option], peak: int, limit: int) -> dict[str, Option]:
    """Give units their next cheaper option where execution shows that this still fits; the most seconds first.

    The solver leaves nothing to relax where its model is exact. Only what the model, by as much as it was seen to say
    too much, might have refused wrongly is executed. Where units are rebuilt together, or tensors leave, nothing is tried.
    """
    if any(o.place is not None or o.offloads for o in assignment.values()):
        return assignment
    model, work, seen = model_of(s), RELAX_WORK, _overestimate(s)
    # of twins, to whom the same option costs and frees the same, one is executed: what the model says is no better than
    # a trial that did not fit is not tried
    rejected: dict[tuple[str, int, float], int] = {}
    while work > 0:
        at = _choice(model, assignment)
        slack = max(model.peak(at) - peak, seen) + SLACK_BYTES
        tries = []
        for u, facts in enumerate(model.options):
            cheaper = [c for c in range(at[u]) if not facts[c].sent_bytes]  # what it costs to send is not in the model
            if not cheaper:
                continue
            old, new = facts[at[u]], facts[cheaper[-1]]
            kind = new.option.name, new.held_bytes - old.held_bytes, new.seconds
            said = model.peak([*at[:u], cheaper[-1], *at[u + 1 :]])
            if said <= limit + slack and said < rejected.get(kind, said + 1):
                tries.append((new.seconds - old.seconds, u, new.option, kind, said))
        if not tries:
            break
        _, u, option, kind, said = min(tries, key=lambda t: (t[0], t[1]))
        s.progress("trying to relax single units")
        trial = s.execute({**assignment, model.units[u]: option})
        work -= trial.ops.stop - trial.ops.start
        fits = s.peak_with_update(trial) <= limit
        if fits and _fresh_peak(s, trial.assignment) <= limit:
            assignment, peak = dict(trial.assignment), s.peak(trial)
            rejected.clear()
        else:
            rejected[kind] = said
    return assignment


def _choice(model: StepModel, assignment: Mapping[str, Option]) -> list[int]:
    """The option index per unit; an option the model has pruned counts as its cheapest."""
    found = []
    for fqn, facts in zip(model.units, model.options, strict=True):
        found.append(next((i for i, o in enumerate(facts) if o.option == assignment[fqn]), 0))
    return found


def _overestimate(s: Study) -> int:
    """By how much the model says more than the executed homogeneous steps showed."""
    seen = [0]
    model = model_of(s)
    for capture in s.captures.values():
        wanted = {f: capture.assignment.get(f, KEEP) for f in model.units}
        choice = _choice(model, wanted)
        if _assignment(model, flat(choice)) == wanted:
            seen.append(model.peak(choice) - s.peak_with_update(capture))
    return max(seen)
