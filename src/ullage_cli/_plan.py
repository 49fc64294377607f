"""`ullage plan`."""

from __future__ import annotations

from typing import Any

import click

from ullage_cli._options import (
    budget_value,
    cost_options,
    json_option,
    load,
    output_file,
    show,
    show_plot,
    small_plot,
    taken_tier,
    target_options,
    tier_options,
    verb,
    verbose_option,
)
from ullage_cli._progress import progress


@verb
@target_options
@click.option("--budget", help="Bytes, '6GiB', '6 GB', '60% of plain', '90% of device' or 'smallest'.")
@click.option(
    "--policy",
    default="optimal",
    show_default=True,
    help="optimal, none, every_block, every_n:K, sqrt, selective or offload.",
)
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="GLOB=ACTION",
    help="Give the units of this name an action: keep, recompute, select, select:LEVEL, offload:host or offload:disk. May be repeated.",
)
@click.option("--forbid", multiple=True, metavar="ACTION", help="An action that no unit gets. May be repeated.")
@click.option("--headroom", metavar="BYTES", help="Leave this much of the budget free, written as the budget is.")
@click.option(
    "--simple", is_flag=True, help="Prefer fewer distinct actions, if that costs 1 % of the step time at most."
)
@tier_options
@cost_options
@click.option("-o", "--output", type=click.Path(dir_okay=False), callback=output_file, help="Write the plan there.")
@verbose_option
@json_option
def plan(
    as_json: bool,
    verbose: bool,
    budget: str | None,
    policy: str,
    pins: tuple[str, ...],
    forbid: tuple[str, ...],
    headroom: str | None,
    simple: bool,
    device: str | None,
    costs: str,
    output: str | None,
    **options: Any,
) -> None:
    """Decide what to keep, recompute, select or offload so that the step fits the budget.

    Exit code 3: no plan fits; the smallest budget that would is said.
    """
    from ullage.planner.decide._planner import study_and_plan
    from ullage.planner.plan._overrides import Overrides
    from ullage.planner.study._tiers import TierRequest

    tier = TierRequest(**taken_tier(options))
    work = load(options)  # its file may register a mechanism that the overrides name
    overrides = Overrides(_pins(pins), forbid, _size(headroom), simple)
    with progress(as_json) as report:
        study, result = study_and_plan(
            work,
            _size(budget),
            device,
            policy,
            costs,
            overrides=overrides,
            tier=tier,
            progress=report,
        )
        if output is not None:
            result.save(output)
        plot = small_plot(study, result, report) if not as_json else None
    show(result, as_json, verbose)
    if plot is not None:
        show_plot(plot)
    if output is not None and not as_json:
        click.echo(f"written to {output}")


def _size(text: str | None) -> int | str | None:
    return budget_value(text) if text is not None else None


def _pins(written: tuple[str, ...]) -> dict[str, str]:
    """`GLOB=ACTION` as a mapping."""
    pins: dict[str, str] = {}
    for text in written:
        glob, found, action = text.rpartition("=")
        if not found or not glob or not action:
            raise click.UsageError(f"--pin {text}: expected GLOB=ACTION, such as 'blocks.0=keep'")
        if pins.setdefault(glob, action) != action:
            raise click.UsageError(f"--pin {text}: {glob} is pinned to {pins[glob]} already")
    return pins
