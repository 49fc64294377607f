"""`ullage frontier`."""

from __future__ import annotations

from typing import Any

import click

from ullage_cli._options import (
    cost_options,
    json_option,
    load,
    output_file,
    show,
    show_plot,
    taken_tier,
    target_options,
    tier_options,
    verb,
)
from ullage_cli._progress import progress


def _picture(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refused now, not after the work."""
    from ullage.planner.answers._draw import check_picture

    if value is not None:
        check_picture(value)
    return value


@verb
@target_options
@click.option("--points", type=click.IntRange(2), default=12, show_default=True, help="Budgets to plan for.")
@tier_options
@cost_options
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), callback=output_file, help="Write it there, plans included."
)
@click.option(
    "--picture", type=click.Path(dir_okay=False), callback=_picture, help="Draw it there: .svg, .png or .pdf."
)
@json_option
def frontier(
    as_json: bool, points: int, device: str | None, costs: str, output: str | None, picture: str | None, **options: Any
) -> None:
    """Plan for budgets from the smallest that is possible to the plain step's peak: step time against peak.

    The plot, and --picture, need the extra `plot`.
    """
    import ullage as ul
    from ullage.planner.answers._draw import terminal

    tier = taken_tier(options)
    with progress(as_json) as report:
        result = ul.frontier(load(options), points, device, costs=costs, progress=report, **tier)
    if output is not None:
        result.save(output)
    if picture is not None:
        result.plot(picture)
    show(result, as_json)
    if not as_json:
        show_plot(lambda width, color: terminal(result, width, color=color))
        for path in (output, picture):
            if path is not None:
                click.echo(f"written to {path}")
