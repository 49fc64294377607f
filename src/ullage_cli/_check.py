"""`ullage check`."""

from __future__ import annotations

from typing import Any

import click

from ullage_cli._errors import FAILED
from ullage_cli._options import budget_value, cost_options, json_option, load_with_plan, show, target_options, verb
from ullage_cli._progress import progress


@verb
@target_options
@click.option("--max-peak", help="The peak may not be above it: bytes, '6GiB', '60% of plain' or '90% of device'.")
@click.option("--max-slowdown", type=float, help="Step time over the plain step's (and, if estimated, the baseline's).")
@click.option(
    "--against",
    type=click.Path(dir_okay=False),
    help="A baseline: the peak may not have grown since.",
)
@click.option("--allow-growth", default="0", show_default=True, help="By more than this: bytes or a size.")
@click.option("--update", is_flag=True, help="Write the baseline (--against) instead of comparing with it.")
@click.option("--plan", "plan_path", type=click.Path(), help="Check the step under this plan.")
@click.option("--budget", help="Check the step under the best plan within this budget.")
@cost_options
@json_option
@click.pass_context
def check(
    context: click.Context,
    /,
    as_json: bool,
    max_peak: str | None,
    max_slowdown: float | None,
    against: str | None,
    allow_growth: str,
    update: bool,
    plan_path: str | None,
    budget: str | None,
    device: str | None,
    costs: str,
    **options: Any,
) -> None:
    """A gate for CI: does the step stay within a peak, a slowdown, and what it took before? Nothing is run.

    Without a plan or a budget the plain step is checked. Exit code 1: it does not; what grew, and where, is said.
    """
    import ullage as ul
    from ullage._files import check_writable

    if update and against is None:
        raise click.UsageError("--update: name the file with --against")
    if update and against is not None:
        check_writable(against)  # refused now, not after the work
    if max_peak is None and max_slowdown is None and against is None and budget is None:
        raise click.UsageError("nothing to check: give --max-peak, --max-slowdown, --budget or --against")
    work, plan = load_with_plan(options, plan_path)
    with progress(as_json) as report:
        gate = ul.check(
            work,
            max_peak=budget_value(max_peak) if max_peak is not None else None,
            max_slowdown=max_slowdown,
            against=None if update else against,
            allow_growth=budget_value(allow_growth),
            plan=plan,
            budget=budget_value(budget) if budget is not None else None,
            device=device,
            costs=costs,
            progress=report,
        )
    if update and gate.ok and against is not None:
        gate.now.save(against)
    show(gate, as_json)
    if update and gate.ok and not as_json:
        click.echo(f"written to {against}")
    context.exit(0 if gate.ok else FAILED)
