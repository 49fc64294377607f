"""The tables of `frontier.py`, made from its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from _peers import PEERS

LOST, CLEAR, POINTS = 1.02, 0.95, 5.0  # a cell is lost above the first, clearly won up to the second; prediction
FAULTS = 100  # page faults in a step, some 0.1 ms
CLOSE_LOSS, CLOSE_GRADIENTS = 1e-5, 1e-2  # relative: another order of operations stays far below


def tables(results: dict[str, Any]) -> str:
    """Markdown: summary, lost cells, a table per model, plans below every peer, inductor if it was measured."""
    models = {n: m for n, m in results["models"].items() if "error" not in m}
    cells = [(m, c) for m in models.values() for c in m["cells"] if c["group"] != "inductor"]
    lines = [_head(results), "", "## Summary", "", *_summary(models, cells), "", "## Lost cells", "", *_lost(cells)]
    for name, m in results["models"].items():
        lines += ["", f"## {name}", ""]
        lines += [f"error: {m['error']}"] if "error" in m else [*_model(m), "", _planning(m), *_not_warm(m)]
    lines += ["", "## Below every peer", "", *_below(models)]
    if any(c["group"] == "inductor" for m in models.values() for c in m["cells"]):
        lines += [
            "",
            "## inductor",
            "",
            "Kernels of its own (fused, compiled) on its side, eager kernels on ullage's.",
            "",
        ]
        for name, m in models.items():
            lines += [f"### {name}", "", *_rows(m, inductor=True), ""]
    return "\n".join(lines) + "\n"


def _head(results: dict[str, Any]) -> str:
    m = results["machine"]
    return (
        f"{m['cpu']}, {m['cores']} cores, one thread; torch {m['torch']}, transformers {m['transformers']}, {m['date']}. "
        f"{results['allocator']}. {results['rounds']} rounds of {results['turns']} steps per contender, seed {results['seed']}.\n\n"
        "At each peer's own peak, in bytes, as budget: ratio = ullage's step time / the peer's, within a turn; median over turns, "
        "then rounds; in brackets the quartiles over all turns. Predicted and measured: the plan's step time over the plain step's. "
        f"Times are the processor's; by the clock on the wall steps took {_waiting(results):.2f} of them."
    )


def error_points(m: dict[str, Any], plan: dict[str, Any]) -> float | None:
    """Predicted minus measured slowdown, in percentage points."""
    if plan.get("slowdown") is None:
        return None
    return 100.0 * (float(plan["predicted_slowdown"]) - float(plan["slowdown"]["value"]))


def is_within(cell: dict[str, Any], bound: float, clock: str = "ratio") -> bool:
    """The cell's ratio is at most `bound`, within the peer's bytes."""
    return bool(cell.get(clock)) and not cell["over_budget"] and cell[clock]["value"] <= bound


def _waiting(results: dict[str, Any]) -> float:
    """Wall time over processor time, median over everything timed."""
    models = [m for m in results["models"].values() if "error" not in m]
    timed = [t for m in models for t in (m["plain"], *m["peers"].values(), *m["plans"].values()) if t.get("seconds")]
    return statistics.median(t["wall_seconds"] / t["seconds"] for t in timed) if timed else 1.0


def _share(flags: Iterable[bool]) -> str:
    found = list(flags)
    return f"{sum(found)} of {len(found)} ({sum(found) / len(found):.0%})" if found else "none"


def _predicted(cells: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    points = [error_points(m, m["plans"][c["plan"]]) for m, c in cells if c.get("plan")]
    return _share(abs(p) <= POINTS for p in points if p is not None)


def _mib(n: float) -> str:
    return f"{n / 2**20:.1f}"


def _least_peer(m: dict[str, Any]) -> tuple[int, str]:
    """The smallest peak of any peer that trains right, and the first that has it."""
    peers = [(p["peak_bytes"], n) for n, p in m["peers"].items() if "peak_bytes" in p and trains_right(p)]
    return min((p for p in peers if not _is_inductor(p[1])), key=lambda p: p[0], default=(0, "none"))


def _is_inductor(peer: str) -> bool:
    return PEERS[peer].group == "inductor"


def _summary(models: dict[str, Any], cells: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    right = [(m, c) for m, c in cells if trains_right(m["peers"][c["peer"]])]
    lines = [
        f"- Cells (peers that save memory): {len(cells)}, of which ullage has no plan or an error in "
        f"{sum(c['error'] is not None for _, c in cells)}, and is over the peer's peak in {sum(bool(c.get('over_budget')) for _, c in cells)}.",
        f"- Ratio at most {LOST}: {_share(is_within(c, LOST) for _, c in cells)}.",
        f"- Ratio at most {CLEAR}: {_share(is_within(c, CLEAR) for _, c in cells)}.",
        f"- Time predicted within {POINTS:.0f} points: {_predicted(cells)}.",
        f"- Peers with the plain step's gradients only: ratio at most {LOST}: {_share(is_within(c, LOST) for _, c in right)}; "
        f"at most {CLEAR}: {_share(is_within(c, CLEAR) for _, c in right)}.",
        f"- By wall time: ratio at most {LOST}: {_share(is_within(c, LOST, 'wall_ratio') for _, c in cells)}; "
        f"at most {CLEAR}: {_share(is_within(c, CLEAR, 'wall_ratio') for _, c in cells)}.",
        "",
        f"| model | plain MiB | plain ms | cells | ratio ≤ {LOST} | ≤ {CLEAR} | time within {POINTS:.0f} points | ullage's smallest MiB | smallest peer MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, m in models.items():
        mine = [(m, c) for _, c in cells if c["model"] == name]
        plan = m["plans"].get(m["smallest"] or "", {})
        least, who = _least_peer(m)
        lines.append(
            f"| {name} | {_mib(m['plain']['peak_bytes'])} | {1e3 * m['plain']['seconds']:.0f} | {len(mine)} | "
            f"{_share(is_within(c, LOST) for _, c in mine)} | {_share(is_within(c, CLEAR) for _, c in mine)} | {_predicted(mine)} | "
            f"{_mib(plan['peak_bytes']) if 'peak_bytes' in plan else 'none'} | {_mib(least)} ({who}) |"
        )
    return lines


def _lost(cells: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    lines = []
    for m, c in cells:
        if is_within(c, LOST):
            continue
        plan = m["plans"].get(c.get("plan") or "", {})
        why = c["error"] or ("over the peer's peak" if c["over_budget"] else "")
        if not why:
            why = "not timed" if c["ratio"] is None else f"{_ratio(c['ratio'])}; {_actions(plan)}"
        lines.append(f"- {c['model']}, {c['peer']} at {_mib(m['peers'][c['peer']]['peak_bytes'])} MiB: {why}")
    return lines or ["None."]


def _ratio(r: dict[str, Any] | None) -> str:
    return "" if r is None else f"{r['value']:.3f} ({r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f})"


def _actions(plan: dict[str, Any]) -> str:
    return ", ".join(f"{n} {a}" for a, n in plan.get("actions", {}).items())


def trains_right(peer: dict[str, Any]) -> bool:
    """Its first loss and its gradients are the plain step's, but for rounding."""
    return bool(peer["first_loss_off"] <= CLOSE_LOSS and peer["gradients_off"] <= CLOSE_GRADIENTS)


def _results(peer: dict[str, Any]) -> str:
    """How the results compare with the plain step's, in words."""
    buffers = "" if peer["buffers_equal"] else ", other buffers"
    if peer["losses_equal"] and peer["gradients_equal"]:
        return f"bitwise{buffers}"
    off = f"first loss {peer['first_loss_off']:.0e}, gradients {peer['gradients_off']:.0e}"
    return f"{'close' if trains_right(peer) else 'WRONG'} ({off}){buffers}"


def _ms(times: dict[str, Any]) -> str:
    return f"{1e3 * times['seconds']:.0f}" if times.get("seconds") else "-"


def _slowdown(times: dict[str, Any]) -> str:
    return f"{times['slowdown']['value']:.3f}" if times.get("slowdown") else "-"


def _rows(m: dict[str, Any], inductor: bool) -> list[str]:
    lines = [
        "| peer | results | peak MiB | ms | of plain | ullage peak MiB | ms | ratio | predicted | measured | error, points |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    cells = {c["peer"]: c for c in m["cells"]}
    for name, p in m["peers"].items():
        if _is_inductor(name) != inductor:
            continue
        if "peak_bytes" not in p:
            lines.append(f"| {name} | {p['error']} | | | | | | | | | |")
            continue
        row = f"| {name} | {_results(p)} | {_mib(p['peak_bytes'])} | "
        if "same_as" in p:
            lines.append(f"{row}same as {p['same_as']} | | | | | | | |")
        elif "error" in p:
            lines.append(f"{row}error: {p['error']} | | | | | | | |")
        elif name not in cells:
            lines.append(f"{row}{_ms(p)} | {_slowdown(p)} | saves nothing | | | | | |")
        elif cells[name]["error"]:
            lines.append(f"{row}{_ms(p)} | {_slowdown(p)} | {cells[name]['error']} | | | | | |")
        else:
            plan, cell = m["plans"][cells[name]["plan"]], cells[name]
            over = " OVER" if cell["over_budget"] else ""
            lines.append(f"{row}{_ms(p)} | {_slowdown(p)} | {_ours(m, plan, over, _ratio(cell['ratio']))} |")
    return lines


def _ours(m: dict[str, Any], plan: dict[str, Any], over: str, ratio: str) -> str:
    points = error_points(m, plan)
    off = "-" if points is None else f"{points:+.1f}"
    return f"{_mib(plan['peak_bytes'])}{over} | {_ms(plan)} | {ratio} | {plan['predicted_slowdown']:.3f} | {_slowdown(plan)} | {off}"


def _model(m: dict[str, Any]) -> list[str]:
    plain = m["plain"]
    return [f"Plain: {_mib(plain['peak_bytes'])} MiB, {_ms(plain)} ms.", "", *_rows(m, inductor=False)]


def _planning(m: dict[str, Any]) -> str:
    if m["planning_error"]:
        return f"Planning: {m['planning_error']}"
    wrong = [i[:12] for i, p in m["plans"].items() if "losses_equal" in p and _results(p) != "bitwise"]
    said = f"; NOT BITWISE: {', '.join(wrong)}" if wrong else "; all bitwise equal to the plain step"
    each = "" if m["plan_seconds"] is None else f", {m['plan_seconds']:.1f} s a plan"
    return f"{len(m['plans'])} distinct plans{said}. All options captured in {m['study_seconds']:.1f} s{each}."


def _not_warm(m: dict[str, Any]) -> list[str]:
    """Contenders that still took fresh pages when they were timed: their times are too long."""
    timed = {"plain": m["plain"], **m["peers"], **{f"plan {i[:12]}": p for i, p in m["plans"].items()}}
    cold = [f"{n} ({t['faults']:.0f})" for n, t in timed.items() if t.get("faults", 0) > FAULTS]
    return ["", f"Page faults in most timed steps: {', '.join(cold)}."] if cold else []


def _below(models: dict[str, Any]) -> list[str]:
    lines = [
        "ullage's smallest feasible plan where it is below the peak of every peer that trains right: not counted above.",
        "",
        "| model | smallest peer MiB | ullage MiB | ms | of plain | predicted | error, points | plan |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, m in models.items():
        plan = m["plans"].get(m["smallest"] or "", {})
        least, _ = _least_peer(m)
        if plan.get("peak_bytes", least) < least:
            points = error_points(m, plan)
            lines.append(
                f"| {name} | {_mib(least)} | {_mib(plan['peak_bytes'])} | {_ms(plan)} | {_slowdown(plan)} | "
                f"{plan['predicted_slowdown']:.3f} | {'-' if points is None else f'{points:+.1f}'} | {_actions(plan)} |"
            )
    return lines
