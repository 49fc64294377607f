"""Contenders in processes of their own, taking turns.

Noise on a shared machine comes in bursts and drifts. Contenders that are compared are therefore alive at the same time, each in its own
process and warm, and take turns, one step each, in an order drawn anew for every turn: what disturbs one disturbs all. A ratio is taken
within a turn, its median over the turns of a round; every round starts all processes again (another layout of memory), and the median
over rounds counts.

A step runs on one thread and waits for nothing, so its time is the processor time of its process: on a machine of its own that is the
wall time, on a shared one it leaves out the time that others ran. Wall times are kept beside it.

The processes are forks of one that has imported everything and run nothing. That one is started with jemalloc preloaded where it is
found, so that the plain step does not pay for page faults.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any

# The last option: without it jemalloc does not cut small blocks from much larger free ones, nor, as nothing decays, join free ones again,
# and a model of many small blocks takes fresh pages in every step for ever (torch's checkpoint too: 20 MiB a step, where live bytes stay).
MALLOC_CONF = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:20"
START_LIMIT = 600  # seconds a contender may take to compile and warm up
STEP_LIMIT = 120
ATTEMPTS = 3  # a run takes hours; whoever ends one process should not end it all
ONCE_LIMIT = 3600  # one recording, or all plans of a model


def say(line: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def jemalloc() -> str | None:
    """Path (or name for the loader) of jemalloc, or None."""
    for folder in (
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ):
        path = Path(folder) / "libjemalloc.so.2"
        if path.exists():
            return str(path)
    return find_library("jemalloc")


def allocator() -> str:
    """What the contenders allocate with, in words."""
    return f"jemalloc ({MALLOC_CONF})" if jemalloc() else "glibc malloc, kept from returning pages by mallopt"


def ask(model: str, request: dict[str, Any]) -> Any:
    """Have a fresh process, under jemalloc where it is found, carry out a request about a model.

    Requests: {"what": "record", "contenders", "reference"} -> results of `_contender.record` by name;
    {"what": "plans", "budgets", "folder"} -> that of `_contender.make_plans`;
    {"what": "turns", "contenders", "turns", "seed"} -> that of `take_turns`.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    library = jemalloc()
    if library:
        env |= {"LD_PRELOAD": library, "MALLOC_CONF": MALLOC_CONF}
    for _ in range(ATTEMPTS):
        run = subprocess.run(
            [sys.executable, __file__, model], input=json.dumps(request), stdout=subprocess.PIPE, text=True, env=env
        )
        if run.returncode == 0:
            return json.loads(run.stdout.splitlines()[-1])
        say(f"{model}: the process that starts contenders ended with {run.returncode}")
    raise RuntimeError(f"the process that starts contenders ended with {run.returncode}, {ATTEMPTS} times")


def _child(call: Callable[..., Any], conn: Any, args: tuple[Any, ...]) -> None:
    """Runs in the fork: whatever is printed goes to stderr, an exception to the parent."""
    os.dup2(2, 1)
    try:
        call(*args)
    except BaseException as error:
        line = str(error).strip().splitlines()
        conn.send({"error": f"{type(error).__name__}: {line[0] if line else ''}"[:300]})
    os._exit(0)


class Process:
    """A forked process and the pipe to it. Replies are dicts; {"error": why} if it raised, died or is too slow."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("fork")
        self.conn, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(call, theirs, (*args, theirs)), daemon=True)
        self.process.start()
        theirs.close()

    def reply(self, limit: float) -> dict[str, Any]:
        """Its next reply."""
        try:
            if self.conn.poll(limit):
                return self.conn.recv()  # type: ignore[no-any-return]
            self.process.kill()
            return {"error": f"no answer within {limit:.0f} s"}
        except EOFError:
            self.process.join()
            return {"error": f"the process died (exit code {self.process.exitcode})"}

    def step(self) -> dict[str, Any]:
        """One timed step."""
        try:
            self.conn.send("step")
        except OSError:
            return {"error": "the process died"}
        return self.reply(STEP_LIMIT)

    def end(self) -> None:
        """Kill and reap it; it holds nothing worth keeping."""
        self.process.kill()
        self.process.join()
        self.conn.close()


def _send_result(call: Callable[..., Any], *args: Any) -> None:
    args[-1].send(call(*args[:-1]))


def once(call: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """What `call(*args)` returns, run in a fork."""
    process = Process(_send_result, call, *args)
    try:
        return process.reply(ONCE_LIMIT)
    finally:
        process.end()


def take_turns(model: str, contenders: list[dict[str, Any]], turns: int, seed: str) -> dict[str, Any]:
    """Timed steps of contenders that are alive together: by name, a list over turns or an error."""
    from _contender import serve

    draw = random.Random(seed)
    processes: dict[str, Process] = {}
    found: dict[str, Any] = {}
    try:
        for contender in draw.sample(contenders, len(contenders)):
            name = contender["name"]
            process = processes[name] = Process(serve, model, contender)
            ready = process.reply(START_LIMIT)
            found[name] = ready if "error" in ready else {**ready, "wall": [], "cpu": [], "step_faults": []}
            warmth = ready.get("error") or f"warm after {ready['warmup']} steps"
            say(f"{model}: {name}: {warmth}")
        for _ in range(turns):
            alive = [n for n in processes if "error" not in found[n]]
            for name in draw.sample(alive, len(alive)):
                step = processes[name].step()
                if "error" in step:
                    found[name] = step
                    continue
                for key, value in (("wall", step["wall"]), ("cpu", step["cpu"]), ("step_faults", step["faults"])):
                    found[name][key].append(value)
    finally:
        for process in processes.values():
            process.end()
    for name, times in found.items():
        say(f"{model}: {name}: {times.get('error') or '%.1f ms' % (1e3 * statistics.median(times['cpu']))}")
    return found


def _carry_out(model: str, request: dict[str, Any]) -> Any:
    from _contender import make_plans, record

    if request["what"] == "record":
        found = {}
        for contender in request["contenders"]:
            found[contender["name"]] = reply = once(record, model, contender, request["reference"])
            say(f"{model}: {contender['name']}: {reply.get('error') or format(reply['peak_bytes'], ',') + ' bytes'}")
        return found
    if request["what"] == "plans":
        return once(make_plans, model, request["budgets"], request["folder"])
    return take_turns(model, request["contenders"], request["turns"], request["seed"])


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    import _contender  # noqa: F401  (what forks share: torch, transformers, ullage)
    import transformers.models.llama.modeling_llama  # noqa: F401

    reply = json.dumps(_carry_out(sys.argv[1], json.loads(sys.stdin.read())))
    print(reply)
