"""`plan`: capture a workload, solve, confirm by executing on fake tensors, tighten, relax."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from msgspec import structs

from ullage._bytes import format_bytes, parse_budget
from ullage._errors import ArgumentError, BudgetError
from ullage._progress import Progress, callback, shows_progress
from ullage.apply import HandleReport
from ullage.measure._state import captures
from ullage.mechanisms import KEEP
from ullage.planner.decide._confirm import infeasible, optimal, smallest_step, solution_of
from ullage.planner.decide._finish import finish
from ullage.planner.decide._simple import fewer_actions
from ullage.planner.decide._window import choose_window
from ullage.planner.model._model import model_of
from ullage.planner.plan._budget import Budget
from ullage.planner.plan._overrides import Overrides, Restriction
from ullage.planner.plan._plan import Plan
from ullage.planner.plan._policies import check_policy, mechanism_of, policy_assignment
from ullage.planner.plan._profile import Profile
from ullage.planner.study._choices import ALL, Choices
from ullage.planner.study._executed import Steps, key_of
from ullage.planner.study._failed import without_failures
from ullage.planner.study._links import assignment_of
from ullage.planner.study._prepare import prepare
from ullage.planner.study._study import Study
from ullage.planner.study._tiers import TierRequest, choose_tier
from ullage.solver._solve import smallest
from ullage.workload import Workload, reading

SMALLEST = "smallest"  # as a budget


@shows_progress
@captures
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
    checksums: bool = False,
    feedback: HandleReport | None = None,
    values: str = "auto",
    assume: Mapping[str, float] | None = None,
    progress: Progress = None,
) -> Plan:
    """Decide per unit what to keep, recompute, select or offload so that the step's peak stays within `budget`.

    Args:
        work: what is trained; left as found.
        budget: bytes or a string (see `ullage.parse_budget`), or "smallest": the smallest for which there is a plan. May be None for a
            named policy.
        device: None (where the model is) or a name of the device table; one that is not here makes it an estimate.
        policy: "optimal" or a named policy.
        costs: "auto" (ops are timed here) or "roofline" (times of the device table, the same on any machine). Bytes are
            those of the kernels here, with either.
        profile: take op costs from this profile instead of measuring again.
        units: FQN globs of the modules to plan over, instead of the blocks the architecture shows.
        pin: actions ("keep", "recompute", "select", "select:LEVEL") by FQN glob of units; any policy obeys, and the plan says
            what each costs.
        forbid: actions that no unit gets, unless it is pinned to one.
        headroom: bytes or a string, as for `budget`: the reserve, which the plan leaves free.
        simple: True: of the plans within 1 % of the best step time, one with the fewest distinct actions; or that share.
        disk_directory: where saved tensors may be offloaded to: an existing directory on this machine, whose speed is measured. It
            serves the CPU and a CUDA device of this machine, not an estimated one.
        disk_budget: bytes or a string: size of a file that is made there while the plan is applied.
        host_budget: bytes or a string: the most pinned host memory for saved tensors of a CUDA device; the plan takes what it
            needs of it. Either this or a disk.
        checksums: compare the bytes that come back from the disk with those sent; the plan is for the speeds with checksums.
        feedback: the report (`Handle.report()`) of an earlier plan with this tier. If its steps waited longer for transfers than
            predicted, transfers are taken to be slower than measured by the same factor.
        values: how values are found that depend on activations and that the step reads, in an `if`, a mask or an index. "assumed": numbers
            of a healthy step (finite, about 1), and for sizes bounds or what `assume` says. "run": two real steps write them down, and
            everything is put back. "auto": assumed where only logs and guards depend on them, else run, where the device is here
            and `assume` is empty. Notes name each line.
        assume: by "mask" (share of its elements that a mask selects), "unique" (share that is distinct) or the line of a read
            ("model.py:41": its number, or the share or number of its elements), what to take.
        progress: called with a line at each stage; None shows one on a terminal after 2 s, False nothing.

    Raises:
        BudgetError: the budget or the headroom can't be read.
        BudgetInfeasible: no plan fits it.
        ArgumentError, CaptureError, WorkloadError, DeviceError: see their docstrings.
    """
    progress = callback(progress)
    overrides, tier = (
        Overrides(pin or {}, forbid, headroom, simple),
        TierRequest(disk_directory, disk_budget, host_budget, feedback, checksums),
    )
    work = reading(work, values, assume)
    return study_and_plan(work, budget, device, policy, costs, profile, units, overrides, tier, progress)[1]


@captures
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
    """Do `plan`'s work, and also return the study, for reports."""
    check_policy(policy)
    overrides, tier = overrides or Overrides(), tier or TierRequest()
    used = mechanism_of(policy)
    sends = f"policy {policy!r}" if used is not None and used.sends else overrides.needs_tier
    if sends and not tier.given:
        raise ArgumentError(
            f"{sends}: offloads tensors, and neither disk_directory with disk_budget nor host_budget says where to"
        )
    overrides.check(policy, budget is not None)
    least = isinstance(budget, str) and budget.strip() == SMALLEST
    wanted = parse_budget(budget) if budget is not None and not least else None
    if wanted is None and not least and policy == "optimal":
        raise BudgetError("budget: policy 'optimal' needs one; or name a policy, such as policy='every_block'")
    chosen = choose_tier(tier, work, device, progress)
    if chosen is not None:
        overrides.check_tier(chosen.name)
    s = prepare(work, device, costs, profile, units, progress, chosen)
    plain = s.plain_steps.peak_bytes
    reserve = overrides.headroom_bytes(plain, s.device.memory_bytes)
    asked = Budget(wanted.resolve(plain, s.device.memory_bytes), reserve) if wanted is not None else None

    def decided() -> Plan:
        restriction = overrides.restrict(s, solver=asked is not None or least)
        choices = restriction.choices(s)
        found = Budget(_least(s, choices) + reserve, reserve) if least else asked
        return decide(s, found, policy, restriction, choices=choices, explain=True)

    from ullage.planner.decide._floor import floor_of, hopeless  # an import of ullage does not need it

    if asked is not None and asked.room < floor_of(s):
        raise hopeless(s, asked, captures(decided))
    return s, decided()


@without_failures
def decide(
    s: Study,
    budget: Budget | None,
    policy: str = "optimal",
    restriction: Restriction | None = None,
    *,
    choices: Choices = ALL,
    explain: bool = False,
) -> Plan:
    """Decide within a budget; any number of decisions may share one study.

    Args:
        s: the study.
        budget: the budget of the plan; None for a named policy.
        policy: "optimal" or a named one.
        restriction: the overrides that the choices come from.
        choices: the options to choose from.
        explain: the plan, or the error, says what holds the peak, which takes a step or two more.

    Raises:
        BudgetInfeasible: no plan fits, or the named policy does not.
    """
    steps, bound = _choose(s, choices, budget, policy, explain)
    if restriction is None:
        return finish(s, choices, steps, budget, policy, bound, {}, explain)
    pins = restriction.pin_costs(s, steps, lambda others: _unconfirmed(s, others, budget, policy, steps))
    notes, overrides = [], restriction.overrides
    if overrides.tolerance and budget is not None:
        steps, note = fewer_actions(s, choices, steps, overrides.tolerance, budget)
        notes.append(note)
    made = finish(s, choices, steps, budget, policy, bound, restriction.why(), explain)
    forbidden = sorted(overrides.forbid)
    return structs.replace(made, pins=pins, forbidden=forbidden, notes=[*made.notes, *filter(None, notes)])


def _choose(s: Study, choices: Choices, budget: Budget | None, policy: str, explain: bool) -> tuple[Steps, float]:
    """Return the chosen steps, and a lower bound on the seconds of any step that fits; 0 for a named policy."""
    plain = s.plain_steps
    if policy != "optimal":
        steps = s.execute_fresh(policy_assignment(policy, s.units, choices.of(s)))
        if budget is not None and steps.peak_bytes > budget.room:
            why = f"policy {policy} peaks at {format_bytes(steps.peak_bytes)}; "
            raise infeasible(s, choices, budget, smallest_step(s, choices), why, explain)
        # without a budget the window may take up to the plain step's peak
        return choose_window(steps, budget or Budget(plain.peak_bytes)), 0.0
    assert budget is not None
    if _plain_fits(s, choices, budget):
        return plain, plain.seconds
    steps, added = optimal(s, choices, budget, explain)
    return steps, plain.seconds + added


def _plain_fits(s: Study, choices: Choices, budget: Budget) -> bool:
    return s.plain_steps.peak_bytes <= budget.room and all(KEEP in o for o in choices.of(s).values())


def _unconfirmed(s: Study, choices: Choices, budget: Budget | None, policy: str, chosen: Steps) -> Steps:
    """Return, executed, what the solver chooses among other choices, without confirming it; `chosen` is `_choose`'s."""
    if policy != "optimal":
        assignment = policy_assignment(policy, s.units, choices.of(s))
        same = key_of(assignment) == key_of(chosen.assignment)
        return s.execute_fresh(assignment, chosen.later.window_bytes if same else 0)
    assert budget is not None
    if _plain_fits(s, choices, budget):
        return s.plain_steps
    model = model_of(s, choices)
    solution, window = solution_of(s, choices, budget.room) or (smallest(model), 0)
    return s.execute_fresh(assignment_of(model, solution.schedule), window)


def smallest_bytes(s: Study) -> int:
    """Return the smallest budget, without a reserve, within which some plan's step was executed."""
    return _least(s, ALL)


@without_failures
def _least(s: Study, choices: Choices) -> int:
    return s.execute_fresh(smallest_step(s, choices).assignment).peak_bytes
