"""The first call of a unit: run its forward, see what it does, and only then free the tensors that need not be kept.

It holds no more than the unit's own backward will: all tensors that the unit saves. It learns which state the forward changes,
whether it draws from Python's generators, whether it can be run again at all, and, for a selective unit, the op log. It takes
digests of the tensors it drops; the first replay has to reproduce them bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ullage._torch import is_lazy
from ullage.runtime.ambient import _ambient as ambient
from ullage.runtime.ambient._eager import check
from ullage.runtime.ambient._local import quiet
from ullage.runtime.forward._packing import packer_of_all
from ullage.runtime.ops._keep import OpsRule
from ullage.runtime.ops._log import Assignments, Recorder
from ullage.runtime.ops._select import Selection, selection_of
from ullage.runtime.ops._writes import Writes
from ullage.runtime.state._gathered import swapped
from ullage.runtime.state._reach import forget, name_in
from ullage.runtime.state._survey import Survey
from ullage.runtime.tensors._fills import late_kernels, mark
from ullage.runtime.tensors._memory import Memory
from ullage.runtime.unit._call import Call
from ullage.runtime.unit._site import Facts, Learnt, refused

_GATHERS = "FSDP gathers its parameters inside it, in a replay not as in forward; call ullage.checkpoint inside the sharded module's forward instead"


def learn(frame: Call, args: tuple[Any, ...], kwargs: dict[str, Any], facts: Facts | None) -> Any:
    """Run the unit's forward, learn from it, and return its output.

    Args:
        frame: this call.
        args: positional arguments.
        kwargs: keyword arguments.
        facts: facts of an earlier call that still hold, or None.
    """
    if _makes_parameters(frame):  # the next call is the first to learn from
        out = frame.run(args, kwargs, packer_of_all(frame))
        forget(frame.roots)
        frame.keep_all()
        return out
    check(frame.reached.is_compiled)
    kinds = frame.kinds
    rule = frame.options.rule if frame.options.context_fn is None else None
    recorder = Recorder() if rule is not None and frame.known is None else None
    with quiet():
        survey = Survey(frame.roots) if facts is None else None
        tensors = [*frame.reached.tensors(), *frame.reached.around]
        memory = Memory(tensors)
    host = ambient.HOST[0]() if facts is None else None
    since = mark()
    writes = Writes(tensors, lambda: frame.count()) if survey is not None and recorder is None else None
    with _recording(frame, recorder, writes):
        out = frame.run(args, kwargs, packer_of_all(frame, recorder.saved if recorder is not None else None))
    late = late_kernels(out, since)
    if late:
        frame.site.digests_last = True
        frame.site.fills |= any(late.values())
        if frame.digests is not None:  # again, as some tensors were not filled when their digests were taken
            frame.digests.update(frame.digests_of(frame.kept))
    if survey is not None:
        hidden = _hidden_writes(frame, recorder, writes, tensors)
        facts = frame.site.facts[kinds] = _facts(frame, survey, host, frame.site.facts.get(kinds), hidden)
    assert facts is not None
    moved = frame.settle()
    if not facts.must_keep and (replacing := _replacing(frame, tensors, memory)):
        facts = frame.site.facts[kinds] = Facts(must_keep=replacing)
    if not facts.must_keep and moved:
        must_keep = "its forward gives a tensor that autograd has saved other memory (`.data =`, `set_`), which a replay that ends before would not"
        facts = frame.site.facts[kinds] = Facts(must_keep=must_keep)
    if not facts.must_keep and frame.site.shared.distrust:
        facts = frame.site.facts[kinds] = Facts(must_keep=frame.site.shared.distrust)
    if facts.must_keep:
        frame.keep_all()
        frame.site.say(f"{facts.must_keep}; its activations are kept")
        return out
    if recorder is not None and rule is not None:
        shared, notes = frame.site.shared, frame.noted()
        frame.known = shared.learn(frame.signature, _selection(frame, recorder), notes)
        if shared.logs is not None:
            shared.logs[frame.signature] = Learnt(recorder.log, notes, frame.site.name)
        if frame.known.selection.refusal:
            refusal = frame.known.selection.refusal
            frame.site.say(f"full replay: {refusal}", warn=refusal == _GATHERS)
    selection = frame.known.selection if frame.known is not None else None
    _drop(frame, selection.kept if selection is not None else frozenset())
    _send(frame, selection.away if selection is not None else frozenset())
    frame.finish()
    if frame.known is not None and frame.notes == frame.known.notes:
        frame.notes = frame.known.notes
    forget(frame.roots)  # a first call may make parameters
    frame.site.noted[kinds] = frame.notes
    return out


@contextlib.contextmanager
def _recording(frame: Call, recorder: Recorder | None, writes: Writes | None) -> Iterator[None]:
    compiled = frame.reached.is_compiled()  # Dynamo would compile the unit once more, for a function mode
    with contextlib.ExitStack() as stack:
        if recorder is not None:
            stack.enter_context(recorder)
            if not compiled:
                stack.enter_context(Assignments(recorder.log))
        elif writes is not None and not compiled:
            stack.enter_context(writes)
        yield


def _makes_parameters(frame: Call) -> bool:
    """Does a lazy module make parameters or buffers in this call?"""
    return any(is_lazy(t) for t in frame.reached.tensors())


def _replacing(frame: Call, tensors: list[Tensor], memory: Memory) -> str:
    """Say why a forward that gives tensors other memory can't be run again; "" if it gives none, or if a replay puts all of it back."""
    put_back = {id(o) for o, _ in frame.entry.values} if frame.entry is not None else set()
    lost = [tensors[i] for i in memory.moved(tensors) if id(tensors[i]) not in put_back]
    if not lost:
        return ""
    return f"its forward gives {name_in(frame.roots, lost[0])} other memory (`.data =`, `set_`), which a replay would replace again"


def _gathers(frame: Call, recorder: Recorder) -> bool:
    """Did FSDP's hooks run inside the unit rather than around it? Inside, the log has their ops, which are not aten's."""
    is_foreign = any(op.func.namespace != "aten" for op in recorder.log.ops)
    return is_foreign and any(hasattr(m, "_get_fsdp_state") for m in frame.reached.all_modules())


def _selection(frame: Call, recorder: Recorder) -> Selection:
    rule = frame.options.rule
    assert rule is not None
    if frame.reached.is_compiled():
        return refused("it is compiled, so what it saves is torch.compile's choice")
    if _gathers(frame, recorder):
        return refused(_GATHERS)
    if isinstance(rule, OpsRule) and (absent := rule.not_among(op.func for op in recorder.log.ops)):
        frame.site.say(f"its forward does not run {absent}, which it was told to keep; nothing is kept of that")
    return selection_of(recorder.log, rule)


def _hidden_writes(frame: Call, recorder: Recorder | None, writes: Writes | None, tensors: list[Tensor]) -> str:
    """Say why a forward that writes where no version tells can't be run again; "" if it does not."""
    if recorder is not None:
        written, behind = recorder.parameters_written(tensors), recorder.behind(frame.kept)
    elif writes is not None:
        written, behind = writes.seen, writes.behind(frame.kept)
    else:
        return ""
    if written:
        return f"its forward writes {name_in(frame.roots, written[0])} through `.data` or another alias, which a replay would write again"
    if behind:
        return f"its forward writes saved tensor {behind[0]} through `.data` or another alias, which a replay that ends before would not"
    return ""


def _facts(frame: Call, survey: Survey, host: Any, earlier: Facts | None, hidden: str) -> Facts:
    with quiet():
        changing = frame.site.changing
        changes, entry = survey.changes(changing() if changing is not None else set(), swapped(frame.reached))
    if changes.containers or changes.values or changes.generators:
        frame.entry = entry
    moved = ambient.host_rng_moved(host, ambient.HOST[0]())
    if moved or frame.options.host_rng:
        frame.rng.append((ambient.HOST, host))
    argument = frame.inputs.written()
    must_keep = ""
    if changes.parameters:
        must_keep = f"its forward writes {changes.parameters[0]}, which a replay would write again"
    elif hidden:
        must_keep = hidden
    elif argument:
        must_keep = f"its forward writes {argument} in place, so a replay would start from other values"
    buffers = frame.reached.buffers()
    if buffers:
        frame.note_buffers(buffers)  # the buffers that it has not changed
    if earlier is not None:
        return Facts(changes | earlier.changes, moved or earlier.host_rng, must_keep, earlier.looks + 1)
    return Facts(changes, moved, must_keep)


def _drop(frame: Call, keep: frozenset[int]) -> None:
    dropped = [i for i in frame.kept if i not in keep]
    proof = frame.known.proof if frame.known is not None else frame.site.shared.proof
    if proof.claim(frame) and frame.digests is None:
        frame.digests = frame.digests_of({i: frame.kept[i] for i in dropped})
    for i in dropped:
        del frame.kept[i]
        frame.held.pop(i, None)
    for i in frame.held:
        frame.held[i] = None


def _send(frame: Call, away: frozenset[int]) -> None:
    for i in sorted(away):
        tensor, version = frame.kept[i]
        if isinstance(tensor, Tensor) and tensor._version == version:
            frame.kept[i] = (frame.site.send(tensor) or tensor, version)
