"""HTML pages: one file with everything in it, plotly's script too, that asks no network for anything."""

from __future__ import annotations

import base64
import importlib.util
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from ullage._bytes import format_bytes, format_seconds
from ullage._errors import ArgumentError
from ullage._files import check_writable, write_whole
from ullage._writers import writes
from ullage.planner.plan._overrides import describe
from ullage.planner.plan._plan import environment
from ullage.report._compare import LETTERS, Comparison, said_of_units
from ullage.report._drawn import drawn_comparison, drawn_overview
from ullage.report._overview import StepReport
from ullage.report._rows import by_module, signed, unit_rows
from ullage.report._sides import NO_MODULE
from ullage.report._tables import frontier_rows, measured_rows
from ullage.report._timeline import phases_of

HOW_TO_GET_IT = "pip install 'ullage[report]'"
ENDINGS = (".html", ".htm")
HOLDERS = 5  # that the summary names


def check_page(path: str | Path) -> Path:
    """Return the path; ArgumentError if no page can be written there. Nothing is created."""
    path = check_writable(path)
    if path.suffix.lower() not in ENDINGS:
        raise ArgumentError(f"{path}: a report is an .html file; give it that ending")
    missing = [name for name in ("plotly", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(f"{path}: an HTML report needs {' and '.join(missing)}; {HOW_TO_GET_IT}")
    return path


@writes(StepReport, "export")
def overview_page(o: StepReport, path: str | Path) -> None:
    """Write a report. The same overview gives the same file."""
    shown = [("planned", o.planned)] if o.planned is not None else []
    shown += [("plain", o.plain)]
    said = {
        "o": o,
        "holders": HOLDERS,
        "at": o.judged.peak,
        "by_unit": list(by_module(o.judged.holdings(units=True)).items())[:HOLDERS],
        "views": [(name, t, t.holdings(units=True), phases_of(t)) for name, t in shown],
        "frontier": frontier_rows(o.frontier) if o.frontier is not None else [],
        "measured": measured_rows(o),
        "units": unit_rows(o.plan.decisions),
        "setup": o.plan.setup,
        "levers": o.plan.bounds.levers if o.plan.bounds is not None else [],
        "plan_file": _plan_link(o),
        "lanes": o.planned is not None and bool(o.planned.transfers),
    }
    _write(path, "report", drawn_overview(o), said)


@writes(Comparison, "export")
def comparison_page(c: Comparison, path: str | Path) -> None:
    """Write a comparison. The same comparison gives the same file."""
    rates = [("samples/s", "samples_per_second"), ("tokens/s", "tokens_per_second")]
    known = [(name, fact) for name, fact in rates if any(getattr(s, fact) is not None for s in c.sides)]
    _write(
        path, "compare", drawn_comparison(c), {"c": c, "letters": LETTERS, "units": said_of_units(c), "rates": known}
    )


def _write(path: str | Path, name: str, data: dict[str, Any], said: dict[str, Any]) -> None:
    path = check_page(path)
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    folder = files("ullage.report") / "page"
    env = Environment(
        loader=PackageLoader("ullage.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"bytes": format_bytes, "seconds": format_seconds, "signed": signed, "pin": describe}
    code = [(folder / f"{part}.js").read_text(encoding="utf-8") for part in ("page", name)]
    text = env.get_template(f"{name}.html").render(
        **said,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        script=Markup("\n".join(code)),
        data=Markup(_json(data)),
        environment=environment(),
        no_module=NO_MODULE,
    )
    write_whole(path, text.encode())


def _plan_link(o: StepReport) -> str:
    """The plan's file as a link's target, so that the page can save it; "" without a plan."""
    if o.planned is None:
        return ""
    return f"data:application/json;base64,{base64.b64encode(o.plan.text()).decode()}"


def _json(data: dict[str, Any]) -> str:
    """JSON that a script element can hold: nothing in it ends the element."""
    return msgspec.json.encode(data).decode().replace("<", "\\u003c")
