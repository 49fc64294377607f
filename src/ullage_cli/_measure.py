"""`ullage measure`."""

from __future__ import annotations

from typing import Any

import click

from ullage_cli._options import json_option, load_with_plan, output_file, show, target_options, verb
from ullage_cli._progress import progress


@verb
@target_options
@click.option("--plan", "plan_path", type=click.Path(), help="A plan file; default: the plain step.")
@click.option("--steps", type=click.IntRange(1), default=7, show_default=True, help="Timed steps.")
@click.option(
    "--snapshot",
    type=click.Path(dir_okay=False),
    callback=output_file,
    help="Write PyTorch's memory snapshot of two more real steps there, for pytorch.org/memory_viz.",
)
@json_option
def measure(as_json: bool, plan_path: str | None, steps: int, snapshot: str | None, **options: Any) -> None:
    """Run real steps: peak bytes and step times."""
    import ullage as ul

    given, plan = load_with_plan(options, plan_path)
    with progress(as_json) as report:
        report("building the model")
        work = given.build()
        result = ul.measure(work, plan, steps, progress=report)
        if snapshot is not None:
            report("recording a memory snapshot")
            ul.record_snapshot(work, plan, snapshot)
    show(result, as_json)
    if snapshot is not None and not as_json:
        click.echo(f"written to {snapshot}")
