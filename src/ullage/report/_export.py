"""Writes a timeline for other tools; the file's ending says which."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

from ullage._errors import ArgumentError
from ullage._files import check_writable, write_whole
from ullage._writers import writes
from ullage.report._chrome import chrome_trace
from ullage.report._snapshot import pickled
from ullage.report._table import csv_text, parquet
from ullage.report._timeline import Timeline

_WRITERS: dict[str, tuple[str, Callable[[Timeline], bytes]]] = {
    ".json": ("a trace for ui.perfetto.dev and chrome://tracing", chrome_trace),
    ".json.gz": ("the same, compressed", lambda t: gzip.compress(chrome_trace(t), mtime=0)),
    ".peak.pickle": ("PyTorch's memory snapshot, with the history up to the peak and its state", lambda t: pickled(t, t.peak_event)),
    ".pickle": ("PyTorch's memory snapshot of both steps, for pytorch.org/memory_viz", pickled),
    ".csv": ("a row per event", csv_text),
    ".parquet": ("a row per event; needs pyarrow", parquet),
}  # fmt: skip
ENDINGS = {ending: what for ending, (what, _) in _WRITERS.items()}
HOW_TO_GET_PYARROW = "pip install 'ullage[parquet]'"


def check_export(path: str | Path) -> str:
    """The ending that says what to write; ArgumentError if it can't be written. Nothing is created."""
    path = check_writable(path)
    name = path.name.lower()
    ending = max((e for e in ENDINGS if name.endswith(e)), key=len, default="")
    if not ending:
        raise ArgumentError(f"{path}: an export is one of {', '.join(ENDINGS)}; the file's ending says which")
    if ending == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ArgumentError(f"{path}: Parquet needs pyarrow; {HOW_TO_GET_PYARROW}")
    return ending


@writes(Timeline, "export")
def export(t: Timeline, path: str | Path) -> None:
    """Write it. The same timeline gives the same file."""
    write_whole(path, _WRITERS[check_export(path)][1](t))
