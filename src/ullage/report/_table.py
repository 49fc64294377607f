"""The timeline as a table, a row per event: CSV and Parquet."""

from __future__ import annotations

import csv
import io
from typing import Any

from ullage.report._records import PHASES
from ullage.report._timeline import Timeline


def columns(t: Timeline) -> dict[str, list[Any]]:
    """Names and values; `live_bytes` is the sum of the columns after it."""
    e = t.events
    modules = [*t.modules, ""]  # -1: none
    found: dict[str, list[Any]] = {
        "event": list(range(len(t))),
        "step": ["first" if i < t.first_events else "later" for i in range(len(t))],
        "micro_batch": e.micro_batch.values.tolist(),
        "phase": [PHASES[k] for k in e.phase.values],
        "module": [modules[k] for k in t.innermost],
        "op": [t.ops[k] for k in e.op.values],
        "source": [t.sources[k] for k in e.source.values],
        "recomputed": e.recomputed.values.tolist(),
        "start_seconds": t.start_seconds.tolist(),
        "seconds": e.seconds.values.tolist(),
        "live_bytes": t.live_bytes.tolist(),
    }
    found |= {f"{c.replace(' ', '_')}_bytes": n.tolist() for c, n in t.live_by_category.items()}
    return found


def csv_text(t: Timeline) -> bytes:
    """RFC 4180, with a header; seconds are written so that they are read back to the bit."""
    table, text = columns(t), io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue().encode()


def parquet(t: Timeline) -> bytes:
    """The same table."""
    import pyarrow
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns(t)), data)
    return data.getvalue()
