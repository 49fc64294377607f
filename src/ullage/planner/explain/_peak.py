"""`Bounds`: the moment of a peak, the tensors alive then, and the levers that would lower it."""

from __future__ import annotations

import msgspec

from ullage._bytes import format_bytes, format_seconds
from ullage.planner.explain._levers import levers
from ullage.planner.explain._peak_facts import Lever, PeakFacts
from ullage.planner.study._choices import Choices
from ullage.planner.study._executed import Steps
from ullage.planner.study._liveness import LiveTensor, by_category, live_tensors, moment, peak_op
from ullage.planner.study._study import Study
from ullage.workload import Setup

MOST_TENSORS, MOST_HOLDINGS = 20, 64  # listed in a plan's file, which a person reads
_ROWS = 12  # of each table as text, which fits a screen


class Holding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Tensors of one category and one unit (or module outside units) that are alive at the peak.

    Attributes:
        category: "parameter", "gradient", "optimizer state", "activation", "recomputed", "temporary", ...
        module: fully qualified name of the unit or module; "" for none.
        nbytes: bytes of all these tensors.
        tensors: their number.
    """

    category: str
    module: str
    nbytes: int
    tensors: int


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The tensors that hold a step's peak, and the levers that would lower it. `str(bounds)` is a table.

    Attributes:
        peak_bytes: the peak.
        step: "first" or "later".
        phase, module, op, source: the moment of the peak.
        estimate: the device is not in this machine.
        by_category: bytes alive then, the largest first; "inside the op" are those that the kernel allocates for itself.
        holdings: the same by category and unit, the largest 64.
        tensors: the largest 20.
        levers: the one that leaves the lowest peak first.
        setup: the facts that these numbers depend on; None in a file of an older version.
    """

    peak_bytes: int
    step: str
    phase: str
    module: str
    op: str
    source: str
    estimate: bool
    by_category: dict[str, int]
    holdings: list[Holding]
    tensors: list[LiveTensor]
    levers: list[Lever]
    setup: Setup | None = None

    @property
    def where(self) -> str:
        """The moment, in words."""
        return _where(self.phase, self.module, self.op)

    def __str__(self) -> str:
        label = ", an ESTIMATE: this device is not here" if self.estimate else ""
        place = f" ({self.source})" if self.source else ""
        lines = [f"peak {format_bytes(self.peak_bytes)} in the {self.step} step: {self.where}{place}{label}"]
        if self.setup is not None:
            lines += [str(self.setup), f"  fits       {self.setup.fits(self.peak_bytes)}"]
        lines.append("  alive then")
        for category, nbytes in self.by_category.items():
            lines.append(f"    {category:<22} {format_bytes(nbytes):>11}  {nbytes / max(self.peak_bytes, 1):6.1%}")
        lines.append("  by unit")
        lines += [f"    {row}" for row in holding_rows(self.holdings)[:_ROWS]]
        lines.append("  largest tensors")
        for t in self.tensors[:_ROWS]:
            lines.append(
                f"    {format_bytes(t.nbytes):>11}  {t.category:<20} {t.module or '(root)'} {t.op} {t.source}".rstrip()
            )
        return "\n".join([*lines, *self.advice()])

    @property
    def hint(self) -> str:
        """The two levers that would lower the peak most, if by 2 % or more, as the end of a sentence.

        It follows a budget that is too small already, so a smaller one is no advice.
        """
        able = [x for x in self.levers if not x.how.startswith("a smaller budget")]
        best = [x for x in able if x.peak_bytes < 0.98 * self.peak_bytes][:2]
        return "".join(f"; without {x.what} {format_bytes(x.peak_bytes)} ({x.how})" for x in best)

    def summary(self) -> list[str]:
        """Return the few lines that a plan shows of it."""
        shares = list(self.by_category.items())[:4]
        lines = [f"  at the peak {', '.join(f'{category} {format_bytes(n)}' for category, n in shares)}"]
        for x in self.levers[:3]:
            lines.append(
                f"  would lower it: {x.what}, {'run so' if x.executed else 'at most'} down to {format_bytes(x.peak_bytes)}: {x.how}"
            )
        return lines

    def advice(self) -> list[str]:
        """Return lines about the levers."""
        if not self.levers:
            return ["  nothing here would lower it: no group of tensors but the parameters holds a hundredth of it"]
        lines = ["  what would lower it"]
        for x in self.levers:
            change = f", {format_seconds(x.seconds)} more per step" if x.seconds > 0 else ""
            kind = "run so" if x.executed else "at most"
            lines.append(f"    {x.what}: {format_bytes(x.nbytes)} of the peak")
            lines.append(
                f"      {kind} down to {format_bytes(x.peak_bytes)}{change}; then {_where(x.phase, x.module, x.op)}"
            )
            lines.append(f"      {x.how}")
        return lines


def _where(phase: str, module: str, op: str) -> str:
    return f"{phase}, {module or '(root)'}, {op}"


def holding_rows(holdings: list[Holding]) -> list[str]:
    """Return one row per group of neighbours with the same category and bytes."""
    rows: list[list[Holding]] = []
    for h in holdings:
        if rows and (rows[-1][0].category, rows[-1][0].nbytes) == (h.category, h.nbytes):
            rows[-1].append(h)
        else:
            rows.append([h])
    out = []
    for run in rows:
        first, last = run[0], run[-1]
        names = [h.module or "(no module)" for h in (first, last)]
        name = names[0] if len(run) == 1 else f"{names[0]} .. {names[1]} ({len(run)})"
        each = " each" if len(run) > 1 else ""
        out.append(f"{format_bytes(first.nbytes):>11}{each:<5}  {first.category:<20} {name}")
    return out


def bounds_of(s: Study, choices: Choices, steps: Steps, runs: int = 1) -> Bounds:
    """Return the bounds of two executed steps; `runs`: how many levers may run steps of their own, see `levers`."""
    captures = s.capture_fresh(steps.assignment)
    worst = captures[not steps.first_is_worst]
    session = worst.session
    at = peak_op(s.timeline(session), worst.ops)
    facts = PeakFacts(s, choices, steps, captures, s.ledger(session), at)
    live = live_tensors(session, s.costs(session), at)
    phase, module, op = moment(session, at)
    return Bounds(
        peak_bytes=facts.peak_bytes,
        step="first" if steps.first_is_worst else "later",
        phase=phase,
        module=module,
        op=op,
        source=session.trace.source[at],
        estimate=s.device.estimate,
        by_category=by_category(live, facts.peak_bytes, steps.later.workspace_bytes),
        holdings=_holdings(s, live),
        tensors=sorted(live, key=lambda t: -t.nbytes)[:MOST_TENSORS],
        levers=levers(facts, runs),
        setup=s.setup,
    )


def _holdings(s: Study, live: list[LiveTensor]) -> list[Holding]:
    units = [u.fqn for u in s.units]
    found: dict[tuple[str, str], list[int]] = {}
    for t in live:
        unit = next((u for u in units if t.module == u or t.module.startswith(u + ".")), t.module)
        found.setdefault((t.category, unit), []).append(t.nbytes)
    rows = [Holding(category=c, module=m, nbytes=sum(n), tensors=len(n)) for (c, m), n in found.items()]
    return sorted(rows, key=lambda h: -h.nbytes)[:MOST_HOLDINGS]
