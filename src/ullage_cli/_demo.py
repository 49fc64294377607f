"""`ullage demo`."""

from __future__ import annotations

import sys

import click

from ullage_cli._errors import FAILED
from ullage_cli._options import json_option, output_file, show, verb
from ullage_cli._progress import progress


@verb
@click.option("--steps", type=click.IntRange(4), default=30, show_default=True, help="Training steps per contender.")
@click.option("--budget", default="60% of plain", show_default=True, help="Budget of ullage's plan.")
@click.option(
    "-o",
    "--output",
    default="plan.json",
    show_default=True,
    type=click.Path(dir_okay=False),
    callback=output_file,
    help="Where the plan is written.",
)
@json_option
@click.pass_context
def demo(context: click.Context, /, steps: int, budget: str, output: str, as_json: bool) -> None:
    """Train a small GPT on English: plain, every block checkpointed, and ullage's plan.

    Exit code 1: losses differ, a prediction is off by more than 1 %, or the budget was not kept.
    """
    from rich.console import Console
    from rich.table import Table

    from ullage._bytes import format_bytes
    from ullage.demo import run_demo

    with progress(as_json) as report:
        result = run_demo(steps, budget, output, report)
    if as_json:
        show(result, True)
    else:
        view = Table("", "predicted peak", "measured peak", "step time", "tokens/s", "final loss")
        for r in result.rows:
            view.add_row(
                r.name,
                format_bytes(r.predicted_peak_bytes),
                format_bytes(r.measured_peak_bytes),
                f"{r.step_seconds * 1e3:.0f} ms",
                f"{r.tokens_per_second:,.0f}",
                r.final_loss,
            )
        console = Console() if sys.stdout.isatty() else Console(width=110)
        console.print(view)
        for text, kept in (
            ("losses identical to the last bit", result.same_loss),
            ("predictions within 1 % of the measured peak", result.predicted),
            (f"budget of {format_bytes(result.budget_bytes)} kept", result.kept),
        ):
            console.print(f"{text}: {'yes' if kept else 'NO'}", highlight=False)
        console.print(f"plan written to {output}", highlight=False)
    context.exit(0 if result.ok else FAILED)
