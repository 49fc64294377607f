"""`ullage compare`."""

from __future__ import annotations

import click

import ullage as ul
from ullage.cli._options import json_option, show


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="A B [C ...]", type=click.Path())
@json_option
def compare(as_json: bool, files: tuple[str, ...]) -> None:
    """Put plans, profiles, timelines, measurements, baselines or monitored runs side by side.

    Each is a file: what `-o` of a verb wrote, what `--json` of it printed, or what a `Monitor` wrote.
    """
    show(ul.compare(*files), as_json)
