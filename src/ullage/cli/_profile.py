"""`ullage profile`."""

from __future__ import annotations

from typing import Any

import click

import ullage as ul
from ullage.cli._options import cost_options, json_option, load, show, target_options
from ullage.cli._progress import progress


@click.command()
@target_options
@cost_options
@json_option
def profile(as_json: bool, device: str | None, costs: str, **options: Any) -> None:
    """Capture one step without running it: the peak, what holds it, the units."""
    with progress() as report:
        result = ul.profile(load(options), device, costs, progress=report)
    show(result, as_json)
