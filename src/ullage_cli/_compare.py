"""`ullage compare`."""

from __future__ import annotations

import click

from ullage_cli._options import json_option, page_option, show, verb


@verb
@click.argument("files", nargs=-1, required=True, metavar="A B [C ...]", type=click.Path())
@page_option
@json_option
def compare(as_json: bool, output: str | None, files: tuple[str, ...]) -> None:
    """Put plans, profiles, timelines, measurements, baselines or monitored runs side by side.

    Each is a file: what `-o` of a verb wrote, what `--json` of it printed, or what a `Monitor` wrote. A page (-o) needs the
    extra `report`.
    """
    import ullage as ul

    result = ul.compare(*files)
    if output is not None:
        result.export(output)
    show(result, as_json)
    if output is not None and not as_json:
        click.echo(f"written to {output}")
