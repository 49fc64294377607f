"""`ullage report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ullage_cli._options import (
    budget_value,
    cost_options,
    json_option,
    load_with_plan,
    page_option,
    show,
    target_options,
    verb,
)
from ullage_cli._progress import progress


@verb
@target_options
@click.option("--plan", "plan_path", type=click.Path(), help="A plan file.")
@click.option("--budget", help="Plan for this, instead: bytes, '6GiB', '6 GB', '60% of plain' or '90% of device'.")
@page_option
@click.option(
    "--measured", multiple=True, type=click.Path(), help="What `ullage measure --json` printed. May be repeated."
)
@click.option("--points", type=click.IntRange(2), default=12, show_default=True, help="Budgets of the frontier.")
@click.option("--no-frontier", is_flag=True, help="Leave out the frontier, which takes most of the time.")
@cost_options
@json_option
def report(
    as_json: bool,
    plan_path: str | None,
    budget: str | None,
    output: str | None,
    measured: tuple[str, ...],
    points: int,
    no_frontier: bool,
    device: str | None,
    costs: str,
    **options: Any,
) -> None:
    """Write a page about the peak: what holds it, live bytes over a step, the units, step time against peak.

    Without --plan and --budget it is about the plain step. The page is one HTML file that needs no network. It needs the
    extra `report`. Exit code 3: no plan fits the budget.
    """
    import ullage as ul

    if output is None and not as_json:
        raise click.UsageError("name the file with -o, such as -o report.html")
    work, plan = load_with_plan(options, plan_path)
    with progress(as_json) as say:
        result = ul.report(
            work,
            plan,
            budget=budget_value(budget) if budget is not None else None,
            points=None if no_frontier else points,
            measured=measured,
            title=_title(options["target"]),
            device=device,
            costs=costs,
            progress=say,
        )
        if output is not None:
            say("writing")
            result.export(output)
    show(result, as_json)
    if output is not None and not as_json:
        click.echo(f"written to {output}")


def _title(target: str) -> str:
    """The target without the folders above it: a page is shown to others."""
    path, colon, factory = target.rpartition(":")
    return f"{Path(path).name}{colon}{factory}" if colon else Path(target).name
