"""`ullage fit`."""

from __future__ import annotations

from typing import Any

import click

from ullage_cli._options import (
    budget_value,
    cost_options,
    json_option,
    output_file,
    show,
    taken_reads,
    taken_tier,
    target_options,
    tier_options,
    verb,
)
from ullage_cli._progress import progress


@verb
@target_options
@click.option("--budget", required=True, help="Bytes, '6GiB', '6 GB' or '90% of device'.")
@click.option(
    "--axis",
    default="batch",
    show_default=True,
    help="batch or seq; of a factory any keyword that takes a whole number.",
)
@click.option("--step", type=click.IntRange(1), help="Try multiples of it only; default: 1, along seq 128.")
@click.option("--at-least", type=click.IntRange(1), help="The smallest value to try; default: the step.")
@click.option(
    "--at-most",
    type=click.IntRange(1),
    help="The largest; default: 65536 for batch, 1048576 for seq, else 1024 steps.",
)
@tier_options
@cost_options
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    callback=output_file,
    help="Write the largest value's plan there.",
)
@json_option
def fit(
    target: str,
    axis: str,
    budget: str,
    device: str | None,
    costs: str,
    step: int | None,
    at_least: int | None,
    at_most: int | None,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the largest batch or sequence that fits the budget with its best plan, and the fastest one tried.

    Exit code 3: not even the smallest value fits; the smallest budget that would do is said.
    """
    import ullage as ul
    from ullage.workload import beside_target, target_along

    tier = taken_tier(options) | taken_reads(options)
    with progress(as_json) as report, beside_target(target):
        result = ul.fit(
            target_along(target, axis, **options),
            budget_value(budget),
            axis,
            device=device,
            costs=costs,
            step=step,
            at_least=at_least,
            at_most=at_most,
            progress=report,
            **tier,
        )
    if output is not None:
        result.plan.save(output)
    show(result, as_json)
    if output is not None and not as_json:
        click.echo(f"written to {output}")
