"""Options and output that several verbs share."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ullage.planner import Plan
    from ullage.planner.study._study import Study
    from ullage.workload import Workload

Command = Callable[..., Any]
SMALL_ROWS = 12
OWN_PROCESS = "own process"  # of the command, which ends with it

_OPTIMIZERS = (
    "adamw, adamw-fused, adamw-foreach, adamw-forloop, adamw-8bit, adamw-master (float32 copies), adafactor, muon, lion, "
    "sgd, sgd-momentum or none"
)
# These are for config.json targets: a factory sets its own.
_TARGET = [
    click.argument("target"),
    click.option("--batch", type=click.IntRange(1), help="Micro-batch size; default: 1."),
    click.option(
        "--seq",
        type=click.IntRange(1),
        help="Sequence length; default: all the model's positions, 4096 at most.",
    ),
    click.option("--dtype", help="Parameters' dtype: fp32, bf16 or fp16; default: the config's, else fp32."),
    click.option("--autocast", metavar="DTYPE", help="Autocast dtype."),
    click.option("--optimizer", metavar="NAME", help=f"{_OPTIMIZERS}; default: adamw."),
    click.option("--accumulate", type=click.IntRange(1), help="Micro-batches per step."),
    click.option(
        "--lora",
        metavar="SPEC",
        help="Adapters on a frozen model: 'r=16,targets=all-linear' or 'r=8,alpha=16,targets=q_proj+v_proj'.",
    ),
    click.option(
        "--base", type=click.Choice(["4bit"]), help="With --lora: frozen linear layers in 4 bits, as in QLoRA."
    ),
]
_COSTS = click.option(
    "--costs",
    type=click.Choice(["auto", "roofline"]),
    default="auto",
    show_default=True,
    help="Time single ops here, or estimate them from the device table.",
)
_READS = (
    click.option(
        "--values",
        type=click.Choice(["auto", "assumed", "run"]),
        default="auto",
        show_default=True,
        help="Values that depend on activations and that the step reads: made up, those of two real steps, or as fits.",
    ),
    click.option(
        "--assume",
        multiple=True,
        metavar="NAME=NUMBER",
        help="Take this for them: mask=0.15, unique=0.5 (shares), or model.py:41=3 for the read at a line.",
    ),
)
_DEVICE = click.option("--device", help="A name of `ullage devices`; default: where the model is.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, errors too.")


class _Verb(click.Command):
    """One that shows ullage's warnings."""

    def invoke(self, ctx: click.Context) -> Any:
        import ullage as ul

        with warnings.catch_warnings():
            warnings.simplefilter("default", ul.UllageWarning)
            return super().invoke(ctx)


def verb(command: Command) -> click.Command:
    """A verb of the command; its help is the function's docstring. (One decorator of click's keeps the first help it meets.)"""
    return click.command(cls=_Verb)(command)


def target_options(command: Command) -> Command:
    """TARGET and what a config.json leaves open."""
    for option in reversed(_TARGET):
        command = option(command)
    return command


def cost_options(command: Command) -> Command:
    """--device, --costs, --values and --assume; `load` and `taken_reads` read the latter two."""
    for option in reversed((_DEVICE, _COSTS, *_READS)):
        command = option(command)
    return command


def verbose_option(command: Command) -> Command:
    """--verbose."""
    return click.option("-v", "--verbose", is_flag=True, help="Name the ops of each action, too.")(command)


def json_option(command: Command) -> Command:
    """--json."""
    return _JSON(command)


_TIER = (
    click.option(
        "--disk-directory",
        type=click.Path(exists=True, file_okay=False),
        help="Saved tensors may go to a file there while others are computed; --disk-budget says how large it is.",
    ),
    click.option("--disk-budget", metavar="BYTES", help="Bytes of that file, such as '64GiB'."),
    click.option(
        "--host-budget",
        metavar="BYTES",
        help="Saved tensors of a CUDA device may go to so much pinned host memory while others are computed.",
    ),
    click.option("--checksums", is_flag=True, help="Compare bytes read back from the disk with those written."),
)


def tier_options(command: Command) -> Command:
    """Options that name a tier for saved tensors; `taken_tier` reads them."""
    for option in reversed(_TIER):
        command = option(command)
    return command


def taken_tier(options: dict[str, Any]) -> dict[str, Any]:
    """Take what `tier_options` give out of a command's options: keywords of `ullage.plan`, `frontier` and `fit`."""
    found = {name: options.pop(name) for name in ("disk_directory", "checksums")}
    return found | {name: _value(options.pop(name)) for name in ("disk_budget", "host_budget")}


def taken_reads(options: dict[str, Any]) -> dict[str, Any]:
    """Take `--values` and `--assume` out of a command's options: keywords of `ullage.plan` and others."""
    pairs = [text.rpartition("=")[::2] for text in options.pop("assume", ())]
    try:
        assume = {name: float(number) for name, number in pairs}
    except ValueError:
        raise click.BadParameter("expected NAME=NUMBER, such as mask=0.15", param_hint="--assume") from None
    return {"values": options.pop("values", "auto"), "assume": assume}


def _value(text: str | None) -> int | str | None:
    return budget_value(text) if text is not None else None


def load(options: dict[str, Any]) -> Workload:
    """The workload that the options of `target_options` name; until the command ends its steps can import what lies beside it."""
    from ullage.workload import beside_target, load_target, reading

    reads = taken_reads(options)
    context = click.get_current_context()
    context.with_resource(beside_target(options["target"]))
    work = reading(load_target(**options), **reads)
    if context.find_root().obj == OWN_PROCESS:
        # imported objects stay until the end: a twentieth of a large plan's time went into looking for garbage among them
        gc.freeze()
    return work


def load_with_plan(options: dict[str, Any], path: str | None) -> tuple[Workload, Plan | None]:
    """The workload, and the plan in a file. The target comes first: it may register a mechanism that the plan uses."""
    from ullage.planner import Plan

    work = load(options)
    return work, Plan.load(path) if path is not None else None


def budget_value(text: str) -> int | str:
    """A budget as the functions take it: digits alone are bytes."""
    return int(text) if text.isdecimal() else text


def output_file(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Callback of an option that names a file to write: refused now, not after the work."""
    if value is not None:
        from ullage._files import check_writable

        check_writable(value)
    return value


def page_file(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The same for a page: also check its ending and the packages it needs."""
    if value is not None:
        from ullage.report._page import check_page

        check_page(value)
    return value


def page_option(command: Command) -> Command:
    """-o of a verb that writes a page."""
    return click.option(
        "-o", "--output", type=click.Path(dir_okay=False), callback=page_file, help="Write it there, as one HTML file."
    )(command)


def show(value: Any, as_json: bool, verbose: bool = False) -> None:
    """Print a result on stdout."""
    import msgspec

    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())
    else:
        click.echo(value.describe(verbose=True) if verbose else str(value))


def small_plot(s: Study, plan: Plan | None, say: Callable[[str], None]) -> Callable[[int, bool], str | None]:
    """A small plot of a step's live bytes, for `show_plot`. Where nothing can be drawn, nothing is laid out."""
    from ullage._plot import can_plot
    from ullage.report._make import plain_timeline_of, planned_timeline_of
    from ullage.report._terminal import terminal

    if not can_plot():
        return lambda width, color: None
    say("laying out the timeline")
    found = plain_timeline_of(s) if plan is None else planned_timeline_of(s, plan)
    return lambda width, color: terminal(found, width, SMALL_ROWS, color)


def show_plot(draw: Callable[[int, bool], str | None]) -> None:
    """Print a plot: as wide as the terminal (100 at most) and in colour, or 80 columns and without where it is piped."""
    from rich.console import Console

    from ullage._plot import HOW_TO_GET_IT

    color = sys.stdout.isatty()
    text = draw(min(Console().width, 100) if color else 80, color)
    click.echo(f"\n{text}" if text is not None else f"a plot of it in the terminal needs plotext; {HOW_TO_GET_IT}")
