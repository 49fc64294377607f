"""`ullage profile | plan | verify | measure | devices | demo`.

Exit codes: 0 done, 1 a check failed (verify), 2 bad usage or input, 3 no plan fits the budget.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

import ullage as ul
from ullage._bytes import format_bytes
from ullage.workload import load_target

_err = Console(stderr=True)


def _target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.argument("target"),
        click.option("--batch", type=click.IntRange(1), help="Micro-batch size (config.json targets)."),
        click.option("--seq", type=click.IntRange(1), help="Sequence length (config.json targets)."),
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "bf16", "fp16"]),
            default="fp32",
            show_default=True,
            help="Parameter dtype.",
        ),
        click.option("--autocast", type=click.Choice(["bf16", "fp16"]), help="Autocast dtype (config.json targets)."),
        click.option(
            "--optimizer",
            type=click.Choice(["adamw", "sgd", "none"]),
            default="adamw",
            show_default=True,
            help="Optimizer.",
        ),
        click.option("--accumulate", type=click.IntRange(1), help="Micro-batches per step (config.json targets)."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _load(kw: dict[str, Any]) -> ul.Workload:
    names = ("target", "batch", "seq", "dtype", "autocast", "optimizer", "accumulate")
    return load_target(**{n: kw.pop(n) for n in names})


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A status line on stderr; nothing when it is not a terminal."""
    with _err.status("starting") as status:
        yield lambda text: status.update(text)


def _print(value: Any, as_json: bool) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=1).decode() if as_json else str(value))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ul.__version__)
def cli() -> None:
    """Keep a PyTorch training step inside a memory budget, in bytes.

    TARGET is path/file.py:factory, package.module:factory (a callable that returns a ullage.Workload) or the config.json
    of a Hugging Face model.
    """


@cli.command()
@_target_options
@click.option("--device", help="A name of `ullage devices`; default: where the model is.")
@click.option(
    "--costs",
    type=click.Choice(["auto", "roofline"]),
    default="auto",
    show_default=True,
    help="Time ops here, or estimate.",
)
def profile(as_json: bool, device: str | None, costs: str, **kw: Any) -> None:
    """Capture one step without running it: the peak, what holds it, the units."""
    with _progress() as progress:
        result = ul.profile(_load(kw), device, costs, progress=progress)
    _print(result, as_json)


@cli.command()
@_target_options
@click.option("--budget", help="Bytes, '6GiB', '6 GB', '60% of plain' or '90% of device'.")
@click.option("--device", help="A name of `ullage devices`; default: where the model is.")
@click.option(
    "--policy", default="optimal", show_default=True, help="optimal, none, every_block, every_n:K, sqrt or selective."
)
@click.option(
    "--costs",
    type=click.Choice(["auto", "roofline"]),
    default="auto",
    show_default=True,
    help="Time ops here, or estimate.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, writable=True), help="Write the plan to this file.")
def plan(
    as_json: bool, budget: str | None, device: str | None, policy: str, costs: str, output: str | None, **kw: Any
) -> None:
    """Decide what to keep, recompute or select so that the step fits the budget."""
    value: int | str | None = int(budget) if budget is not None and budget.isdigit() else budget
    with _progress() as progress:
        result = ul.plan(_load(kw), value, device, policy, costs=costs, progress=progress)
    if output is not None:
        result.save(output)
    _print(result, as_json)
    if output is not None and not as_json:
        click.echo(f"written to {output}")


@cli.command()
@_target_options
@click.option("--plan", "plan_path", required=True, type=click.Path(exists=True, dir_okay=False), help="A plan file.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps to compare.")
def verify(as_json: bool, plan_path: str, steps: int, **kw: Any) -> None:
    """Prove that the plan changes no bit of gradients, buffers, parameters and optimizer state. Runs real steps."""
    with _progress() as progress:
        progress("running plain and planned steps")
        check = ul.verify(_load(kw).build(), ul.Plan.load(plan_path), steps)
    _print(check, as_json)
    sys.exit(0 if check.ok else 1)


@cli.command()
@_target_options
@click.option(
    "--plan", "plan_path", type=click.Path(exists=True, dir_okay=False), help="A plan file; default: the plain step."
)
@click.option("--steps", type=click.IntRange(1), default=7, show_default=True, help="Timed steps.")
def measure(as_json: bool, plan_path: str | None, steps: int, **kw: Any) -> None:
    """Run real steps: peak bytes and step times."""
    with _progress() as progress:
        progress("running steps")
        result = ul.measure(_load(kw).build(), ul.Plan.load(plan_path) if plan_path else None, steps)
    _print(result, as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def devices(as_json: bool) -> None:
    """List the device table."""
    table = ul.devices()
    if as_json:
        _print(table, True)
        return
    view = Table("name", "device", "memory", "bandwidth", "bf16 dense", "margin")
    for name, d in sorted(table.items()):
        rate = d.flops.get("bfloat16") or d.flops.get("float16") or d.flops["float32"]
        view.add_row(
            name,
            d.title,
            format_bytes(d.memory_bytes),
            f"{d.memory_bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
            f"{rate / 1e12:,.1f} TFLOP/s",
            f"{d.margin:.0%}",
        )
    Console().print(view)


@cli.command()
@click.option("--steps", type=click.IntRange(2), default=30, show_default=True, help="Training steps per contender.")
@click.option("--budget", default="60% of plain", show_default=True, help="Budget of ullage's plan.")
@click.option(
    "-o",
    "--output",
    default="plan.json",
    show_default=True,
    type=click.Path(dir_okay=False),
    help="Where the plan is written.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def demo(steps: int, budget: str, output: str, as_json: bool) -> None:
    """Train a small GPT on English: plain, every block checkpointed, and ullage's plan."""
    from ullage.demo import run_demo

    with _progress() as progress:
        rows, fits = run_demo(steps, budget, output, progress)
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(r) for r in rows], indent=1))
    else:
        view = Table("", "predicted peak", "measured peak", "step time", "tokens/s", "final loss")
        for r in rows:
            view.add_row(
                r.name,
                format_bytes(r.predicted_peak_bytes),
                format_bytes(r.measured_peak_bytes),
                f"{r.step_seconds * 1e3:.0f} ms",
                f"{r.tokens_per_second:,.0f}",
                r.final_loss,
            )
        Console().print(view)
        click.echo(
            f"losses identical to the last bit: {fits.same_loss}; predictions within 1%: {fits.predicted}; budget kept: {fits.budget}"
        )
        click.echo(f"plan written to {output}")
    sys.exit(0 if fits.same_loss and fits.predicted and fits.budget else 1)


def main() -> None:
    """Entry point: errors of ours become one line on stderr and an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", ul.UllageWarning)
            cli(standalone_mode=True)
    except ul.BudgetInfeasible as error:
        _err.print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(3)
    except (ul.UllageError, ValueError) as error:
        _err.print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)
