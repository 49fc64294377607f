"""`ullage measure`."""

from __future__ import annotations

from typing import Any

import click

import ullage as ul
from ullage.cli._options import json_option, load, show, target_options
from ullage.cli._progress import progress


@click.command()
@target_options
@click.option("--plan", "plan_path", type=click.Path(), help="A plan file; default: the plain step.")
@click.option("--steps", type=click.IntRange(1), default=7, show_default=True, help="Timed steps.")
@json_option
def measure(as_json: bool, plan_path: str | None, steps: int, **options: Any) -> None:
    """Run real steps: peak bytes and step times."""
    plan = ul.Plan.load(plan_path) if plan_path is not None else None
    with progress() as report:
        report("building the model")
        result = ul.measure(load(options).build(), plan, steps, progress=report)
    show(result, as_json)
