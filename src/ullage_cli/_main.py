"""`ullage profile | plan | bounds | timeline | report | frontier | fit | verify | measure | check | compare | devices | demo`.

Exit codes: 0 done, 1 a check failed (verify, check, demo), 2 bad usage or input, 3 no plan fits the budget.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ullage_cli._bounds import bounds
from ullage_cli._check import check
from ullage_cli._compare import compare
from ullage_cli._demo import demo
from ullage_cli._devices import devices
from ullage_cli._errors import BAD_INPUT, finish
from ullage_cli._fit import fit
from ullage_cli._frontier import frontier
from ullage_cli._measure import measure
from ullage_cli._options import OWN_PROCESS
from ullage_cli._plan import plan
from ullage_cli._profile import profile
from ullage_cli._report import report
from ullage_cli._timeline import timeline
from ullage_cli._verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ullage")
def cli() -> None:
    """Keep a PyTorch training step inside a memory budget, in bytes.

    TARGET is path/file.py:factory, package.module:factory (a callable that returns a ullage.Workload) or the config.json
    of a Hugging Face model.
    """


for verb in (profile, plan, bounds, timeline, report, frontier, fit, verify, measure, check, compare, devices, demo):
    cli.add_command(verb)


def run(arguments: Sequence[str], process: str = "") -> int:
    """Run the command; return its exit code. It prints errors and raises none. `process`: OWN_PROCESS, or the caller's."""
    try:
        return int(cli.main(list(arguments), prog_name="ullage", standalone_mode=False, obj=process) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return BAD_INPUT
    except (KeyboardInterrupt, click.Abort):
        click.echo("error: interrupted", err=True)
        return 130
    except Exception as error:
        return finish(error, "--json" in arguments)


def main() -> None:
    """Entry point."""
    sys.exit(run(sys.argv[1:], OWN_PROCESS))
