"""`ullage timeline`."""

from __future__ import annotations

from typing import Any

import click

from ullage_cli._options import (
    cost_options,
    json_option,
    load_with_plan,
    output_file,
    show,
    show_plot,
    target_options,
    verb,
)
from ullage_cli._progress import progress


def _exports(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Refused now, not after the work."""
    from ullage.report import check_export

    for value in values:
        check_export(value)
    return values


@verb
@target_options
@click.option("--plan", "plan_path", type=click.Path(), help="A plan file; default: the plain step.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), callback=output_file, help="Write the timeline there, as JSON."
)
@click.option(
    "--export",
    "exports",
    multiple=True,
    type=click.Path(dir_okay=False),
    callback=_exports,
    help="Write it for another tool: .json or .json.gz (Perfetto, Chrome), .pickle or .peak.pickle (PyTorch's memory "
    "snapshot), .csv or .parquet. May be repeated.",
)
@cost_options
@json_option
def timeline(
    as_json: bool,
    plan_path: str | None,
    output: str | None,
    exports: tuple[str, ...],
    device: str | None,
    costs: str,
    **options: Any,
) -> None:
    """Say what is alive at every op of a first and a later step, by category, without running it.

    The plot needs the extra `plot`, Parquet the extra `parquet`.
    """
    import ullage as ul
    from ullage.report._terminal import terminal

    work, plan = load_with_plan(options, plan_path)
    with progress(as_json) as report:
        result = ul.timeline(work, plan, device=device, costs=costs, progress=report)
        report("writing")
        if output is not None:
            result.save(output)
        for path in exports:
            result.export(path)
    show(result, as_json)
    if not as_json:
        show_plot(lambda width, color: terminal(result, width, color=color))
        for path in (*([output] if output is not None else []), *exports):
            click.echo(f"written to {path}")
