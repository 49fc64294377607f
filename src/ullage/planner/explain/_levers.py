"""What would lower a peak: per group of tensors that are alive then, the peak of the step without them, and how to get there.

Most levers take a group's bytes out of the timeline: at every moment of the first and the later step, the live bytes less
those of the group; the largest is the peak that is left, and its moment is what would hold it. So it is what the lever can
bring at most. Where the other way of running is known exactly (another loop in the optimizer, fewer activations kept), the
two steps are run that way on fake tensors instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ullage.measure._reach import optimizers_of
from ullage.mechanisms import KEEP
from ullage.planner.explain._levers_by_running import kept, one_by_one, own_peak, set_to_none
from ullage.planner.explain._names import units_of
from ullage.planner.explain._peak_facts import Lever, PeakFacts
from ullage.runtime import MATMUL

CHUNKS = 8
MOST_RUNS = 4  # levers for which steps are run


def levers(p: PeakFacts, runs: int = MOST_RUNS) -> list[Lever]:
    """All that hold a hundredth of the peak or more; the one that leaves the lowest peak first.

    `runs`: how many of the levers that need two steps of their own may be tried: finer units, then the groups of units that
    keep activations, the largest first. (What the optimizer could do
    otherwise is tried anyway where it holds the peak.)
    """
    own = list(own_peak(p, runs))
    found = [
        *_logits(p),
        *_optimizer_temporaries(p),
        *_gradients(p),
        *_optimizer_state(p),
        *own,
        *_inputs(p),
        *kept(p, runs - sum(x.executed for x in own)),
    ]
    return sorted((x for x in found if x.peak_bytes < p.peak_bytes), key=lambda x: (x.peak_bytes, x.what))


def _logits(p: PeakFacts) -> Iterator[Lever]:
    """From the head's matmul, the last one of the forward, to its own backward: logits, what the loss makes, gradients."""
    ledger = p.ledger
    some = np.zeros(len(ledger.nbytes), np.bool_)
    for first, last in _heads(p):
        some |= (ledger.category == "") & (ledger.birth >= first) & (ledger.birth < last)
    gone = "a fused linear cross-entropy, which never holds all logits"
    chunks = f"compute head and loss over {CHUNKS} chunks of the batch, each with its backward"
    yield from p.taken_out("logits and loss", some, gone)
    yield from p.taken_out(f"logits and loss but for 1/{CHUNKS}", some, chunks, share=1 - 1 / CHUNKS)


def _heads(p: PeakFacts) -> Iterator[tuple[int, int]]:
    """(the head's matmul, the first op of its backward) per micro-batch; none if blocks are the last to run one."""
    trace, ledger = p.session.trace, p.ledger
    of_signature = np.array([x.func in MATMUL for x in p.session.signatures])
    matmul = of_signature[np.array(trace.signature, np.int64)]
    sequence = np.array([min(i, 2**62) for i in trace.sequence], np.int64)
    classes = [u.class_name for u in p.s.units if u.block]
    repeated = {u.fqn for u in p.s.units if u.block and classes.count(u.class_name) > 1}
    for step in p.captures:
        backward = ledger.phase[step.ops] == "backward"
        edges = np.flatnonzero(np.diff(backward.astype(np.int8), prepend=0, append=0)) + step.ops.start
        start = step.ops.start
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            heads = np.flatnonzero(matmul[start:begin] & (ledger.phase[start:begin] == "forward"))
            if len(heads) and ledger.unit[head := start + int(heads[-1])] not in repeated:
                own = (sequence[begin:end] == sequence[head] - 1) & ~ledger.recomputed[begin:end]
                if own.any():
                    yield head, int(begin + own.argmax())
            start = int(end)


def _optimizer_temporaries(p: PeakFacts) -> Iterator[Lever]:
    """What is made and freed while the optimizer runs."""
    ledger, session = p.ledger, p.session
    some = (ledger.category == "") & (ledger.birth >= 0) & (ledger.phase[ledger.birth] == "optimizer")
    optimizers = optimizers_of(session.inst)
    fusable = optimizers and all("fused" in o.defaults for o in optimizers)
    how = "fused=True updates without temporaries" if fusable else "an optimizer that updates in place"
    found = list(p.taken_out("optimizer temporaries", some, how))
    yield from found
    names = {str(session.signatures[i].func) for i in set(session.trace.signature)}
    if found and any(n.startswith("aten._foreach_") for n in names):
        steps = one_by_one(p)
        yield p.run_instead(
            "optimizer temporaries of all parameters at once",
            found[0].nbytes,
            steps,
            "foreach=False takes one at a time",
        )


def _gradients(p: PeakFacts) -> Iterator[Lever]:
    """Gradients of this step; and those of the step before, where nothing sets them to None."""
    ledger, given = p.ledger, (p.ledger.category == "gradient") & (p.ledger.birth < 0)
    yield from p.taken_out("gradients that were there before the step", given, "set them to None before training")
    mine = (ledger.category == "gradient") & ~given
    yield from p.taken_out(
        "gradients",
        mine,
        "update each parameter inside backward (Tensor.register_post_accumulate_grad_hook) and set its gradient to None; "
        "not with clipping or accumulation",
    )
    over = mine & (ledger.birth < p.captures[1].ops.start) & (ledger.death >= p.captures[1].ops.start)
    if p.matters(nbytes := p.held(over)):
        how = "zero_grad(set_to_none=True)"
        yield p.run_instead("gradients kept from the step before", nbytes, set_to_none(p), how)


def _optimizer_state(p: PeakFacts) -> Iterator[Lever]:
    how = "an optimizer with less state (SGD, 8-bit or factored Adam), or state sharded over ranks (FSDP, ZeRO)"
    yield from p.taken_out("optimizer state", p.ledger.category == "optimizer state", how)


def _inputs(p: PeakFacts) -> Iterator[Lever]:
    """Inputs of units that are not kept: all that recomputing leaves to hold."""
    rebuilt = {f for f, o in p.assignment.items() if o != KEEP}
    calls = [c for c in p.session.calls if c.fqn in rebuilt and c.first_op >= p.captures[0].ops.start]
    some = p.records(frozenset().union(*(c.records_in for c in calls)))
    how = "a smaller budget: of units that are rebuilt together only the first one's input is held"
    yield from p.taken_out(
        f"inputs of {units_of(len(rebuilt))}, saved to rebuild them", some & (p.ledger.category == ""), how
    )
