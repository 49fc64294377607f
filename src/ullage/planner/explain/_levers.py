"""Levers: per group of tensors alive at a peak, the peak of the step without them, and a way to get there.

Most levers take a group's bytes out of the timeline: at every moment of the first and the later step, the group's live bytes are
subtracted, and the largest sum is the peak that is left. That is the most that the lever can bring. If the change can be
run exactly (another loop in the optimizer, fewer activations kept), the two steps are run that way on fake tensors instead.
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

CHUNKS = 8  # chunks of the batch in the advice about logits: an example, which already removes 7/8 of their bytes
MOST_RUNS = 4  # levers that run steps of their own, two each. Not tuned


def levers(p: PeakFacts, runs: int = MOST_RUNS) -> list[Lever]:
    """Return all levers whose group holds a hundredth of the peak or more; the one that leaves the lowest peak first.

    Args:
        p: the peak.
        runs: how many of the levers that need two steps of their own may be tried: finer units, then groups of units that keep
            activations, the largest first. The optimizer's other ways are tried in any case if it holds the peak.
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
    """Take out logits, the loss's tensors and their gradients: all made between the head's matmul and that op's backward."""
    ledger = p.ledger
    some = np.zeros(len(ledger.nbytes), np.bool_)
    for first, last in _heads(p):
        some |= (ledger.category == "") & (ledger.birth >= first) & (ledger.birth < last)
    gone = "a fused linear cross-entropy, which never holds all logits"
    chunks = f"compute head and loss over {CHUNKS} chunks of the batch, each with its backward"
    yield from p.taken_out("logits and loss", some, gone)
    yield from p.taken_out(f"logits and loss but for 1/{CHUNKS}", some, chunks, share=1 - 1 / CHUNKS)


def _heads(p: PeakFacts) -> Iterator[tuple[int, int]]:
    """Yield (the head's matmul, the first op of its backward) per micro-batch; none if a block runs the forward's last matmul."""
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
    """Take out tensors made and freed while the optimizer runs."""
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
    """Take out gradients of this step, and those of the step before if nothing sets them to None."""
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
    trained, held = max(p.s.setup.trained, 1), p.s.setup.optimizer_bytes
    smaller = "an optimizer with less state (SGD, 8-bit or factored Adam), or " if held > 3 * trained else ""
    how = f"{smaller}state sharded over ranks (FSDP, ZeRO)"
    yield from p.taken_out("optimizer state", p.ledger.category == "optimizer state", how)


def _inputs(p: PeakFacts) -> Iterator[Lever]:
    """Take out the inputs of units that are not kept: recomputing a unit needs its input."""
    replayed = {f for f, o in p.assignment.items() if o != KEEP}
    calls = [c for c in p.session.calls if c.fqn in replayed and c.first_op >= p.captures[0].ops.start]
    some = p.records(frozenset().union(*(c.records_in for c in calls)))
    how = "a smaller budget: of units that are recomputed together only the first one's input is held"
    yield from p.taken_out(
        f"inputs of {units_of(len(replayed))}, saved to recompute them", some & (p.ledger.category == ""), how
    )
