"""What `ullage.Monitor` adds to a step, with a line of JSON per step, and with TensorBoard too.

`python benchmarks/monitor.py [--rounds 3]` writes results/monitor.json and the table results/monitor.md.

One model per process, trained on one thread under jemalloc where it is found, warm (until a step makes next to no page faults). The
contenders take turns on it: no monitor, a monitor, a monitor that also logs to TensorBoard every 10 steps, one step each in an order
drawn anew. A monitor makes its records every 64 steps, or after a second, so the unit that is compared is a turn of 64 steps of each: a ratio is that of
two sums within a turn, its median is taken over the turns of a round, and the median over rounds, in fresh processes, counts. The time is
the processor time of the thread (a step waits for nothing), what the monitor does between steps included. Beside it the time spent
inside the monitor's own calls, in the same steps: the ratio also has what it does to caches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from _machine import machine
from _timing import MALLOC_CONF, allocator, jemalloc, say

STEPS = 64  # of each contender in a turn
TARGET = 0.01
# layers, width, heads, batch, sequence; turns per round
MODELS: dict[str, tuple[tuple[int, int, int, int, int], int]] = {
    "2 layers, d=32, 128 tokens": ((2, 32, 4, 2, 64), 12),
    "4 layers, d=64, 256 tokens": ((4, 64, 4, 4, 64), 6),
    "6 layers, d=128, 1024 tokens": ((6, 128, 4, 8, 128), 1),
}
KINDS = ("plain", "every block recomputed")
CONTENDERS = ("none", "monitor", "monitor, TensorBoard")


def one_round(name: str, kind: str, seed: int) -> dict[str, Any]:
    """A round, in this process: for each contender its seconds per step, turn by turn; microseconds inside the monitor."""
    import torch

    import ullage as ul
    from ullage.demo import GPT
    from ullage.measure._measure import keep_pages
    from ullage.monitor import TensorBoardLogger

    torch.set_num_threads(1)
    keep_pages()
    (layers, width, heads, batch, seq), turns = MODELS[name]
    torch.manual_seed(0)
    model = GPT(layers=layers, width=width, heads=heads, seq=seq)
    ids = torch.randint(256, (batch, seq))
    optimizer = torch.optim.AdamW(model.parameters())
    if kind != "plain":
        work = ul.Workload(model, ids, loss=_loss, optimizer=lambda p: torch.optim.AdamW(p))
        ul.plan(work, policy="every_block", costs="roofline").apply(model)

    def step() -> torch.Tensor:
        loss = _loss(model(ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    with tempfile.TemporaryDirectory() as folder:
        monitors = {
            n: ul.Monitor(model, samples_per_step=batch, tokens_per_step=batch * seq, peak_flops=1e11, jsonl=f"{folder}/{k}.jsonl",
                          loggers=[TensorBoardLogger(f"{folder}/tb")] if k == 2 else [])
            for k, n in enumerate(CONTENDERS) if n != "none"
        }  # fmt: skip
        return _take_turns(step, monitors, turns, random.Random(seed))


def _loss(logits: Any, ids: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _take_turns(step: Callable[[], Any], monitors: dict[str, Any], turns: int, draw: random.Random) -> dict[str, Any]:
    inside = dict.fromkeys(monitors, 0.0)

    def timed(name: str) -> float:
        clock = time.thread_time
        start = clock()
        if name == "none":
            step()
            return clock() - start
        m = monitors[name]
        m.step_begin()
        begun = clock()
        loss = step()
        done = clock()
        m.step_end(loss)
        end = clock()
        inside[name] += begun - start + end - done
        return end - start

    for _ in range(12):  # warm-up of the model and, with it, of the monitors
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for name in CONTENDERS:
            timed(name)
        if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 48:
            break
    inside.update(dict.fromkeys(monitors, 0.0))
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(turns):
        sums = dict.fromkeys(CONTENDERS, 0.0)
        for _ in range(STEPS):
            for name in draw.sample(CONTENDERS, len(CONTENDERS)):
                sums[name] += timed(name)
        for name, seconds in sums.items():
            found[name].append(seconds / STEPS)
    summaries = {name: m.summary() for name, m in monitors.items()}
    for m in monitors.values():
        m.close()
    return {
        "seconds": found,
        "inside": {name: seconds / (turns * STEPS) for name, seconds in inside.items()},
        "recorded": {name: s.steps for name, s in summaries.items()},
    }


def ask(name: str, kind: str, seed: int) -> dict[str, Any]:
    """A round in a fresh process."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    library = jemalloc()
    if library:
        env |= {"LD_PRELOAD": library, "MALLOC_CONF": MALLOC_CONF}
    command = [sys.executable, __file__, "--one", json.dumps([name, kind, seed])]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def judged(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of a model; the range of the rounds' medians beside them."""
    found: dict[str, Any] = {"step_seconds": statistics.median(statistics.median(r["seconds"]["none"]) for r in rounds)}
    for name in CONTENDERS[1:]:
        ratios = [
            statistics.median(b / a for a, b in zip(r["seconds"]["none"], r["seconds"][name], strict=True))
            for r in rounds
        ]
        inside = statistics.median(r["inside"][name] for r in rounds)
        found[name] = {
            "added": statistics.median(ratios) - 1,
            "lowest": min(ratios) - 1,
            "highest": max(ratios) - 1,
            "inside_seconds": inside,
            "inside": inside / found["step_seconds"],
        }
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "Processor time that a monitor adds to a step. `added`: ratio to the same steps without, within turns; in brackets the lowest and highest of the rounds. `inside`: spent in the monitor's own calls.",
        "",
        "| model | units | step, ms | monitor: added | inside | | with TensorBoard: added | inside | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, kinds in results["models"].items():
        for kind, m in kinds.items():
            cells = [name, kind, f"{1e3 * m['step_seconds']:.2f}"]
            for contender in CONTENDERS[1:]:
                c = m[contender]
                cells.append(f"{c['added']:+.2%} ({c['lowest']:+.2%}, {c['highest']:+.2%})")
                cells += [f"{c['inside']:.2%}", f"{1e6 * c['inside_seconds']:.0f} µs"]
            lines.append("| " + " | ".join(cells) + " |")
    worst = max(m["monitor"]["inside"] for kinds in results["models"].values() for m in kinds.values())
    added = max(m["monitor"]["added"] for kinds in results["models"].values() for m in kinds.values())
    lines += [
        "",
        f"Target: below {TARGET:.0%}. The most, over these: {added:+.2%} added, {worst:.2%} inside (without TensorBoard).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_round(*json.loads(args.one))))
        return
    results: dict[str, Any] = {"machine": machine(), "allocator": allocator(), "rounds": args.rounds, "models": {}}
    for name in MODELS:
        results["models"][name] = {}
        for kind in KINDS:
            rounds = [ask(name, kind, seed) for seed in range(args.rounds)]
            results["models"][name][kind] = found = judged(rounds)
            say(f"{name}, {kind}: {found['monitor']['added']:+.2%} added, {found['monitor']['inside']:.2%} inside")
    text = table(results)
    if not args.no_write:
        (HERE / "results" / "monitor.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "results" / "monitor.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
