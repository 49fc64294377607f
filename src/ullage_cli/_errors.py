"""Errors become one line on stderr, or with --json one object on stdout, and an exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import click

FAILED, BAD_INPUT, INFEASIBLE = 1, 2, 3


def finish(error: BaseException, as_json: bool) -> int:
    """Say what went wrong; return the exit code."""
    if os.environ.get("ULLAGE_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)
    kind, message, code, more = _usage(error) if isinstance(error, click.ClickException) else _failure(error)
    message = " ".join(message.split())
    if as_json:
        click.echo(json.dumps({"error": kind, "message": message} | more))
    else:
        red = "\033[31m" if sys.stderr.isatty() else ""
        click.echo(f"{red}error: {message}{red and chr(27) + '[0m'}", err=True)
    return code


_Said = tuple[str, str, int, dict[str, Any]]  # class, message, exit code, and what else JSON has


def _usage(error: click.ClickException) -> _Said:
    """Of the command line, which click has read: torch is not imported to say so."""
    message = error.format_message()
    if isinstance(error, click.UsageError):
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx is not None else ""
        message = f"{message.rstrip('.')}{hint}"
    return "UsageError", message, BAD_INPUT, {}


def _failure(error: BaseException) -> _Said:
    import ullage as ul

    kind = type(error).__name__
    if isinstance(error, ul.BudgetInfeasible):
        return kind, str(error), INFEASIBLE, {"smallest_bytes": error.smallest_bytes, "bound_by": list(error.bound_by)}
    if isinstance(error, ul.UllageError):
        return kind, str(error), BAD_INPUT, {}
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {frames[-1].filename}:{frames[-1].lineno}; ULLAGE_TRACEBACK=1 shows the way there)" if frames else ""
    return kind, f"the step raised {kind}: {error}{where}", BAD_INPUT, {}
