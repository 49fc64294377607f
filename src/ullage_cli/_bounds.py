"""`ullage bounds`."""

from __future__ import annotations

from typing import Any

import click

from ullage_cli._options import cost_options, json_option, load_with_plan, show, target_options, verb
from ullage_cli._progress import progress


@verb
@target_options
@click.option("--plan", "plan_path", type=click.Path(), help="A plan file; default: the plain step.")
@cost_options
@json_option
def bounds(as_json: bool, plan_path: str | None, device: str | None, costs: str, **options: Any) -> None:
    """Say what holds the peak: the moment, the tensors alive then, and what would lower it, with numbers."""
    import ullage as ul

    work, plan = load_with_plan(options, plan_path)
    with progress(as_json) as report:
        result = ul.bounds(work, plan, device, costs, progress=report)
    show(result, as_json)
