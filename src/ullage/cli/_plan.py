"""`ullage plan`."""

from __future__ import annotations

from typing import Any

import click

import ullage as ul
from ullage.cli._options import budget_value, cost_options, json_option, load, output_file, show, target_options
from ullage.cli._progress import progress


@click.command()
@target_options
@click.option("--budget", help="Bytes, '6GiB', '6 GB', '60% of plain' or '90% of device'.")
@click.option(
    "--policy", default="optimal", show_default=True, help="optimal, none, every_block, every_n:K, sqrt or selective."
)
@cost_options
@click.option("-o", "--output", type=click.Path(dir_okay=False), callback=output_file, help="Write the plan there.")
@json_option
def plan(
    as_json: bool, budget: str | None, policy: str, device: str | None, costs: str, output: str | None, **options: Any
) -> None:
    """Decide what to keep, recompute or select so that the step fits the budget.

    Exit code 3: no plan fits; the smallest budget that would is said.
    """
    value = budget_value(budget) if budget is not None else None
    with progress() as report:
        result = ul.plan(load(options), value, device, policy, costs=costs, progress=report)
    if output is not None:
        result.save(output)
    show(result, as_json)
    if output is not None and not as_json:
        click.echo(f"written to {output}")
