"""`ullage verify`."""

from __future__ import annotations

from typing import Any

import click

from ullage_cli._errors import FAILED
from ullage_cli._options import json_option, load_with_plan, show, target_options, verb
from ullage_cli._progress import progress


@verb
@target_options
@click.option("--plan", "plan_path", required=True, type=click.Path(), help="A plan file.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps to compare.")
@click.option(
    "--scope",
    type=click.Choice(["auto", "step", "units"]),
    default="auto",
    show_default=True,
    help="Whole steps, or unit by unit; auto: units where the plain step does not fit.",
)
@json_option
@click.pass_context
def verify(context: click.Context, /, as_json: bool, plan_path: str, steps: int, scope: str, **options: Any) -> None:
    """Prove that the plan changes no bit of gradients, buffers, parameters and optimizer state. Runs real steps.

    Exit code 1: something differs.
    """
    import ullage as ul

    work, plan = load_with_plan(options, plan_path)
    assert plan is not None  # it is required
    with progress(as_json) as report:
        report("building the model")
        check = ul.verify(work.build(), plan, steps, scope, progress=report)
    show(check, as_json)
    context.exit(0 if check.ok else FAILED)
