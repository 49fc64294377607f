"""Errors become one line on stderr, or with --json one object on stdout, and an exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import click

import ullage as ul

FAILED, BAD_INPUT, INFEASIBLE = 1, 2, 3


def finish(error: BaseException, as_json: bool) -> int:
    """Say what went wrong; return the exit code."""
    if os.environ.get("ULLAGE_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)
    message = " ".join(_message(error).split())
    if as_json:
        said: dict[str, Any] = {"error": _kind(error), "message": message}
        if isinstance(error, ul.BudgetInfeasible):
            said |= {"smallest_bytes": error.smallest_bytes, "bound_by": list(error.bound_by)}
        click.echo(json.dumps(said))
    else:
        red = "\033[31m" if sys.stderr.isatty() else ""
        click.echo(f"{red}error: {message}{red and chr(27) + '[0m'}", err=True)
    return INFEASIBLE if isinstance(error, ul.BudgetInfeasible) else BAD_INPUT


def _kind(error: BaseException) -> str:
    return "UsageError" if isinstance(error, click.ClickException) else type(error).__name__


def _message(error: BaseException) -> str:
    if isinstance(error, click.UsageError):
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx is not None else ""
        return f"{error.format_message().rstrip('.')}{hint}"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, ul.UllageError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {frames[-1].filename}:{frames[-1].lineno}; ULLAGE_TRACEBACK=1 shows the way there)" if frames else ""
    return f"the step raised {type(error).__name__}: {error}{where}"
