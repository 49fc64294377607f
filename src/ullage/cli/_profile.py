"""`ullage profile`."""

from __future__ import annotations

from typing import Any

import click

from ullage.cli._options import cost_options, json_option, load, show, show_plot, small_plot, target_options
from ullage.cli._progress import progress
from ullage.planner._profile import study_and_profile


@click.command()
@target_options
@cost_options
@json_option
def profile(as_json: bool, device: str | None, costs: str, **options: Any) -> None:
    """Capture one step without running it: the peak, what holds it, the units."""
    with progress() as report:
        study, result = study_and_profile(load(options), device, costs, progress=report)
        plot = small_plot(study, None, report) if not as_json else None
    show(result, as_json)
    if plot is not None:
        show_plot(plot)
