"""The parts of `gpu.py`: each returns its findings as JSON, small enough for eight minutes on one GPU in all.

A part takes the device and returns {"rows": [...], "failed": [...]}. On a CPU the same code runs on smaller models, so that it can't rot;
a part names each check that needs a GPU and leaves it out.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ullage as ul
from ullage.demo import GPT

Found = dict[str, Any]
ROOT = Path(__file__).parent.parent
TIMED = 10  # steps per number


def next_byte(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def gpt(
    device: str, layers: int, width: int, batch: int, seq: int, dropout: float = 0.0, **options: Any
) -> ul.Workload:
    torch.manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    model = GPT(layers=layers, width=width, heads=max(width // 64, 1), seq=seq, dropout=dropout).to(device, dtype)
    ids = (torch.arange(batch * seq) * 2654435761 % 251).view(batch, seq).to(device)
    return ul.Workload(model, ids, loss=next_byte, optimizer=adamw, **options)


def convolutions(device: str, width: int, size: int) -> ul.Workload:
    torch.manual_seed(0)

    def block(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())

    blocks = [block(3, width), *(block(width, width) for _ in range(3))]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).to(device)
    x = torch.linspace(-1, 1, 8 * 3 * size * size, device=device).view(8, 3, size, size)
    y = torch.arange(8, device=device)
    return ul.Workload(model, x, loss=lambda out, _: F.cross_entropy(out, y), optimizer=adamw)


def small(device: str) -> dict[str, Callable[[], ul.Workload]]:
    """Models whose predictions are judged."""
    large = device != "cpu"
    width, seq = (512, 512) if large else (64, 64)
    return {
        "gpt fp32": lambda: gpt(device, 6, width, 4, seq),
        "gpt bf16 autocast, dropout": lambda: gpt(device, 6, width, 4, seq, dropout=0.1, autocast=torch.bfloat16),
        "gpt bf16, 2 micro-batches": lambda: gpt(device, 6, width, 4, seq, dtype=torch.bfloat16, accumulate=2),
        "convolutions, BatchNorm": lambda: convolutions(device, 64 if large else 8, 64 if large else 16),
    }


def tests(device: str) -> Found:
    """The tests that need a CUDA device."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    lines = run.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if run.returncode != 0 and not failed:
        failed = [f"pytest ended with {run.returncode}"]
    return {"rows": [{"said": lines[-1] if lines else ""}], "failed": failed}


def prediction(device: str) -> Found:
    """Predicted peaks of steps 1 and 3 against the allocator's, plain and with a plan; on CUDA its reserved bytes, too."""
    rows, failed = [], []
    for name, make in small(device).items():
        work = make()
        profile = ul.profile(work)
        plans: list[tuple[str, ul.Plan | None]] = [
            ("plain", None),
            ("every_block", ul.plan(work, policy="every_block")),
        ]
        for label, plan in plans:
            _emptied()
            found = ul.measure(work, plan, steps=1)
            said: Any = profile if plan is None else plan.predicted
            row = {"model": name, "plan": label, "measured": found.step_peaks[::2]}
            row |= {"predicted": [said.first_step_peak_bytes, said.later_step_peak_bytes]}
            row |= {"reserved_measured": found.reserved_bytes or None, "reserved_predicted": said.reserved_bytes}
            rows.append(row)
            off = [abs(p / m - 1) for p, m in zip(row["predicted"], row["measured"], strict=True)]
            if max(off) > 0.02:
                failed.append(f"{name}, {label}: peak off by {max(off):.2%}")
    return {"rows": rows, "failed": failed}


def promise(device: str) -> Found:
    """At three budgets the measured peak is within the budget, and the planned step is bitwise the plain one."""
    rows, failed = [], []
    for name, make in small(device).items():
        work = make()
        plain = ul.profile(work).peak_bytes
        smallest = ul.plan(work, "smallest")
        least = smallest.predicted.peak_bytes
        for label, budget in (("smallest", least), ("halfway", (least + plain) // 2), ("plain", plain)):
            plan = smallest if budget == least else ul.plan(work, budget)
            _emptied()
            measured = ul.measure(work, plan, steps=1).peak_bytes
            exact = ul.verify(work, plan).ok
            rows.append({"model": name, "budget": label, "bytes": budget, "measured": measured, "exact": exact})
            if measured > budget or not exact:
                failed.append(f"{name}, {label}: {measured:,} of {budget:,} bytes, exact: {exact}")
    return {"rows": rows, "failed": failed}


def frontier(device: str) -> Found:
    """Points of the frontier of a 1B GPT in bf16 (a small one on a CPU): predicted and measured bytes and seconds."""
    size = (16, 2048, 4, 1024) if device != "cpu" else (4, 64, 2, 64)
    work = gpt(device, *size, dtype=torch.bfloat16)
    found = ul.frontier(work, points=4)
    rows, failed = [], []
    for point in found.points:
        _emptied()
        m = ul.measure(work, point.plan, steps=TIMED)
        row = {"budget": point.budget_bytes, "predicted": point.peak_bytes, "measured": m.peak_bytes}
        row |= {
            "predicted_seconds": point.step_seconds,
            "seconds": m.step_seconds,
            "reserved_measured": m.reserved_bytes,
        }
        rows.append(row)
        if m.peak_bytes > point.budget_bytes:
            failed.append(f"{m.peak_bytes:,} of {point.budget_bytes:,} bytes")
    return {"rows": rows, "failed": failed}


def offload(device: str) -> Found:
    """Steps that offload to pinned memory and to a file: seconds, and the transfer time that computing hides."""
    size = (8, 1024, 4, 1024) if device != "cpu" else (4, 64, 4, 64)
    work = gpt(device, *size)
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        tiers: dict[str, dict[str, Any]] = {
            "disk": {"disk_directory": folder, "disk_budget": "8GiB" if device != "cpu" else "64MiB"}
        }
        if device != "cpu":
            tiers["host"] = {"host_budget": "8GiB"}
        plain = ul.measure(work, steps=TIMED)
        for name, tier in tiers.items():
            plan = ul.plan(work, policy="offload", **tier)
            _emptied()
            m, moved = ul.measure(work, plan, steps=TIMED), plan.predicted.traffic
            row = {
                "tier": name,
                "peak": m.peak_bytes,
                "predicted": plan.predicted.peak_bytes,
                "plain_peak": plain.peak_bytes,
            }
            row |= {
                "seconds": m.step_seconds,
                "predicted_seconds": plan.predicted.step_seconds,
                "plain_seconds": plain.step_seconds,
            }
            row |= {"sent_bytes": moved.sent_bytes if moved is not None else 0}
            row |= {"hidden_seconds_predicted": moved.hidden_seconds if moved is not None else 0.0}
            rows.append(row)
            if not ul.verify(work, plan).ok:
                failed.append(f"{name}: not bitwise the plain step")
    return {"rows": rows, "failed": failed, "left out": [] if device != "cpu" else ["pinned host memory: needs a GPU"]}


def overhead(device: str) -> Found:
    """Host time that checkpointing adds per block: ullage's and torch's, taking turns in one process."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    blocks = GPT(layers=24, width=64, heads=4, seq=32).to(device).blocks
    x = torch.randn(2, 32, 64, device=device)
    ways: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "plain": lambda block, x: block(x),  # type: ignore[no-any-return]
        "torch": lambda block, x: checkpoint(block, x, use_reentrant=False),  # type: ignore[no-any-return]
        "ullage": lambda block, x: ul.checkpoint(block, x),  # type: ignore[no-any-return]
        "ullage, selective": lambda block, x: ul.checkpoint(block, x, keep="matmul_attention"),  # type: ignore[no-any-return]
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(25):
        for name, way in ways.items():
            _synchronized(device)
            began = time.perf_counter()
            h = x.requires_grad_()
            for block in blocks:
                h = way(block, h)
            h.sum().backward()
            _synchronized(device)
            if turn >= 5:
                times[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(t) for name, t in times.items()}
    rows = [
        {"way": n, "added_us_per_block": 1e6 * (t - middle["plain"]) / len(blocks)}
        for n, t in middle.items()
        if n != "plain"
    ]
    return {"rows": rows, "failed": []}


def generators_and_streams(device: str) -> Found:
    """Dropout under a plan, the device's generator after it, and units on another stream: bitwise as plain."""
    failed, rows = [], []
    states = {}
    for name, checkpointed in (("plain", False), ("checkpointed", True)):
        torch.manual_seed(3)
        model = GPT(layers=3, width=64, heads=4, seq=64, dropout=0.2).to(device)
        x = torch.randn(2, 64, 64, device=device, requires_grad=True)
        with _side_stream(device):
            for _ in range(2):
                h = x
                for block in model.blocks:
                    h = ul.checkpoint(block, h) if checkpointed else block(h)
                h.square().mean().backward()
        _synchronized(device)
        generator = torch.cuda.get_rng_state() if device != "cpu" else torch.get_rng_state()
        states[name] = [x.grad, *(p.grad for p in model.blocks.parameters()), generator]
    equal = [torch.equal(a, b) for a, b in zip(states["plain"], states["checkpointed"], strict=True)]  # type: ignore[arg-type]
    rows.append({"compared": len(equal), "equal": sum(equal), "side stream": device != "cpu"})
    if not all(equal):
        failed.append("gradients or the generator differ")
    return {"rows": rows, "failed": failed, "left out": [] if device != "cpu" else ["a side stream: needs a GPU"]}


def _emptied() -> None:
    """Let what earlier steps have reserved not count."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _synchronized(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _side_stream(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield


# in the order of their worth, as a lent GPU may go away; with the seconds that each may take
PARTS: dict[str, tuple[Callable[[str], Found], int]] = {
    "generators_and_streams": (generators_and_streams, 45),
    "prediction": (prediction, 75),
    "promise": (promise, 120),
    "tests": (tests, 75),
    "overhead": (overhead, 30),
    "frontier": (frontier, 75),
    "offload": (offload, 60),
}
