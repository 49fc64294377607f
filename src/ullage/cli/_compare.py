"""`ullage compare`."""

from __future__ import annotations

import click

import ullage as ul
from ullage.cli._options import json_option, show


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="A B [C ...]", type=click.Path())
@json_option
def compare(as_json: bool, files: tuple[str, ...]) -> None:
    """Put plans, profiles, timelines, measurements or baselines side by side.

    Each is a file: what `-o` of a verb wrote, or what `--json` of it printed.
    """
    show(ul.compare(*files), as_json)
