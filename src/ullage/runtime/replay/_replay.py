"""Run a unit's forward again during backward, compare it with the notes of the forward, and collect the dropped tensors.

Idea: the replay runs the unit's own code under the state, flags and generators of the call. If the call has a proven selection, a
dispatch mode skips ops whose results nothing needs (`_skip`); if that fails in any way, a full replay follows.

Invariant: what a replay reads has the values that the forward read (`_reads` finds changes; they are put back, followed by
`Watch`, or refused), and after it everything is as it was just before it. Each collected tensor is compared with its note, and
the first replay of a kind with digests.

Known non-optimalities: a failed selective replay costs a second, full one. A unit that reads a changed tensor is replayed under
`Watch`, op by op in Python. Replays of units in units repeat: the outer replay runs the inner forward, whose own backward
replays it once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ullage._errors import ReplayError
from ullage._torch import pop_hooks, push_hooks, set_grad_enabled
from ullage.runtime.ambient import _ambient as ambient
from ullage.runtime.ambient._local import Giving, local, quiet
from ullage.runtime.ambient._totals import totals
from ullage.runtime.ops._debug import OpNames
from ullage.runtime.ops._select import Selection
from ullage.runtime.ops._watch import Changed, Watch
from ullage.runtime.replay._after import Left
from ullage.runtime.replay._collect import Collector, Stop
from ullage.runtime.replay._reads import Before, changed_error, changed_reads, mark_restored
from ullage.runtime.replay._skip import SkipMode, Stale
from ullage.runtime.tensors._digest import digest
from ullage.runtime.tensors._memory import storage_of
from ullage.runtime.tensors._sparse import SparseProducts
from ullage.runtime.unit._call import Call
from ullage.runtime.unit._modified import Modified
from ullage.runtime.unit._site import Facts, refused


def rebuild(frame: Call) -> dict[int, Any]:
    """Rebuild the tensors that a frame dropped: selectively where that is proven, otherwise in full.

    Raises:
        ReplayError: the replay differs from the forward.
    """
    changed = changed_reads(frame)
    if changed:
        return _without(frame, changed)
    try:
        return _from_what_was(frame)
    except _Moved as moved:
        return _without(frame, moved.names)


def _from_what_was(frame: Call) -> dict[int, Any]:
    """Rebuild from the forward's arguments, parameters and state, none of which has changed for good."""
    selection = _usable(frame)
    if selection is not None:
        try:
            store, _ = _attempt(frame, selection)
        except Stale as stale:
            _note_stale(frame, str(stale))
        except (ReplayError, _Moved):
            raise
        # torch refuses a placeholder with many kinds of errors; an error of the unit's own comes again in the full replay
        except Exception as error:
            _note_stale(frame, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            if _proven(frame, store, selection):
                if frame.site.shared.distrust:
                    _check_values(frame, store)
                frame.site.skipped += selection.skipped
                totals.skipped += selection.skipped
                return store
    store, _ = _attempt(frame, None)
    _check_values(frame, store)
    return store


def rebuild_arguments(frame: Call) -> dict[int, Any]:
    """Rebuild with copies of the arguments of inner units, as those were when the inner units were called.

    The plain step does not save such an argument, so the outer unit may write to it afterwards.
    """
    changed = changed_reads(frame)
    try:
        store = _without(frame, changed, copies=True) if changed else _attempt(frame, None, copies=True)[0]
    except _Moved as moved:
        store = _without(frame, moved.names, copies=True)
    return {i: x for i, x in store.items() if type(x) is not Modified}


def run_again(frame: Call, record: bool) -> Any:
    """Run a unit's forward to its end for its output.

    Args:
        frame: the call.
        record: keep the tensors that it saves, for its own backward; otherwise keep nothing.

    Raises:
        ReplayError: it differs from the forward.
    """
    changed = changed_reads(frame)
    if changed:
        raise changed_error(frame, next(iter(changed.values())))
    try:
        store, out = _attempt(frame, None, whole="recorded" if record else "dropped")
    except _Moved as moved:
        raise changed_error(frame, next(iter(moved.names.values()))) from None
    if record:
        _check_values(frame, store)
        frame.take(store)
    return out


def _without(frame: Call, changed: dict[int, str], copies: bool = False) -> dict[int, Any]:
    """Rebuild every saved tensor; leave out those computed from an input that changed since the forward."""
    try:
        return _attempt(frame, None, Watch(changed), copies=copies)[0]
    except Changed as changing:
        raise changed_error(frame, changing.name, changing.read) from None


def _usable(frame: Call) -> Selection | None:
    known = frame.known
    if known is None or not frame.complete:
        return None
    if frame.stale:
        _note_stale(frame, "this call saved other tensors than the log says")
        return None
    if ambient.autocasting():
        # the cast of a skipped op is a placeholder: it would stay in the autocast cache of the region around backward
        frame.site.say("full replay: backward is called under autocast", warn=False)
        return None
    selection = known.selection
    # until its proof, only the call that took the digests may use a log
    if selection.refusal or not (known.proof.done or known.proof.belongs_to(frame)):
        return None
    return selection


def _note_stale(frame: Call, why: str) -> None:
    frame.site.stale += 1
    totals.stale += 1
    frame.site.shared.forget(frame.signature)
    frame.site.say(f"a stale op log ({why}); what it dropped is rebuilt in full, the next call makes a new log")


def _proven(frame: Call, store: dict[int, Any], selection: Selection) -> bool:
    """Compare with the digests, if the call took some; refuse a selection for good if its replay gave other bits."""
    known = frame.known
    assert known is not None
    bad = _differing(frame, store)
    if bad is None:
        if known.proof.belongs_to(frame):
            known.proof.done = True
        return True
    totals.mismatches += 1
    known.selection = refused(f"its selective replay gave other values (saved tensor {bad})")
    frame.site.say(f"full replay: {known.selection.refusal}")
    return False


def _differing(frame: Call, store: dict[int, Any]) -> int | None:
    if not frame.digests:
        return None
    # a saved tensor that the forward writes to afterwards has its new values in the plain step's backward, too: don't compare it
    state = frame.entry.values if frame.entry is not None else ()
    written = {storage_of(o) for o, _ in state if isinstance(o, Tensor)}
    written.update(frame.inputs.elsewhere)
    if frame.back is not None:
        written |= {storage_of(t) for t, _ in frame.back.memory}
    with quiet():
        for i, wanted in frame.digests.items():
            if wanted is None or not isinstance(store.get(i), Tensor) or (written and storage_of(store[i]) in written):
                continue
            if digest(store[i]) != wanted:
                return i
    return None


_WHY = "state or random draws that ullage can't see, or an op that is not deterministic"


def _check_values(frame: Call, store: dict[int, Any]) -> None:
    shared = frame.site.shared
    if not frame.digests:
        if shared.distrust:  # this forward ran before another call's replay failed, and took no digests
            frame.site.warn(f"{shared.distrust}. Gradients of this call may differ from the plain step's")
        return
    bad = _differing(frame, store)
    if bad is None:
        shared.proof.done = True
        return
    totals.mismatches += 1
    what = (
        f"its replay gave other values than its forward (saved tensor {bad}, shape {tuple(store[bad].shape)}): {_WHY}"
    )
    shared.distrust = f"a replay gave other values than its forward: {_WHY}"
    frame.site.say(f"{shared.distrust}; its activations are kept", warn=False)
    if frame.options.determinism_check == "values":
        raise ReplayError(
            f"{frame.site.name}: {what}; keep this unit, or make it deterministic. Its later calls keep their activations"
        )
    frame.site.warn(f"{what}. Gradients may differ from the plain step's; later calls keep their activations")


def _attempt(
    frame: Call, selection: Selection | None, watch: Watch | None = None, whole: str = "", copies: bool = False
) -> tuple[dict[int, Any], Any]:
    replay = Collector(frame, selection, whole, copies)
    if selection is None or not local.units:
        frame.site.replays += 1
    totals.replays += 1
    if frame.on_replay is not None:
        frame.on_replay()
    grad = torch.is_grad_enabled()
    set_grad_enabled(True)
    quiet_before, local.quiet = local.quiet, False
    before = [(source[1], source[0]()) for source, _ in frame.rng]
    memory, ended, failed = Before(frame), False, False
    left, now = Left(frame, replay), ambient.read_flags()
    try:
        # before the flags are set: asking for arguments may start replays of outer units, and those must not share an autocast
        # cache with this one
        (args, kwargs), copied = _arguments(frame, watch)
        frame.reached.set_training()  # `left` puts the present flags back
        for source, state in frame.rng:
            source[1](state)
        if frame.entry is None and frame.back is None and frame.flags == now:
            out = _run(frame, replay, selection, args, kwargs, watch)
            replay.note_modified()
        else:
            with _as_it_was(frame, now):
                out = _run(frame, replay, selection, args, kwargs, watch)
                replay.note_modified()
        store, ended = replay.finish(), True
        if frame.restored or copied:
            mark_restored({**frame.restored, **copied}, store)
        return store, out
    except Stale:
        raise
    except BaseException:
        failed = True
        raise
    finally:
        replay.close()
        local.quiet = quiet_before
        set_grad_enabled(grad)
        for put, state in before:
            put(state)
        # a forward that stops early has not put back what it would put back near its end
        left.put_back(ended)
        ambient.put_back(now)
        frame.inputs.put_back()
        name = memory.put_back(frame)
        if name and not failed:
            raise _written(frame, name)


def _written(frame: Call, name: str) -> ReplayError:
    """Return the error for a replay that wrote to a parameter or moved it, which no learning call did; later calls keep everything."""
    must_keep = (
        f"some of its forwards write {name} or give it other memory (`.data =`, `set_`), which a replay would do again"
    )
    frame.site.facts[frame.kinds] = Facts(must_keep=must_keep)
    return ReplayError(
        f"{frame.site.name}: its replay has written {name} or given it other memory (`.data =`, `set_`), which its first call had not; "
        "the memory is put back, what was written in it is not. Its later calls keep their activations"
    )


class _Moved(Exception):
    """Arguments that the outer unit can't give back with their old values; names by storage."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names


def _arguments(frame: Call, watch: Watch | None) -> tuple[tuple[list[Any], dict[str, Any]], dict[int, str]]:
    """Return the arguments, and which of them are copies: where such an argument is itself a saved tensor, the plain step would fail.

    Arguments with other values are followed by `watch`; without one, `_Moved` is raised.
    """
    if not frame.inputs.hooked:
        return frame.inputs.give(), {}
    before, local.giving = local.giving, Giving()
    try:
        given = frame.inputs.give()
        if local.giving.moved:
            if watch is None:
                raise _Moved(local.giving.moved)
            watch.changed.update(local.giving.moved)
        return given, local.giving.copied
    finally:
        local.giving = before


@contextlib.contextmanager
def _as_it_was(frame: Call, now: ambient.Flags) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(ambient.flags_as(frame.flags, now))
        if frame.contexts is None:  # otherwise it is set inside the user's contexts, which may set a device themselves
            stack.enter_context(ambient.device_as(frame.device))
        if frame.back is not None:  # before `entry`, which may write into memory that this puts back
            stack.enter_context(frame.back.seen())
        if frame.entry is not None:
            stack.enter_context(frame.entry.seen())
        yield


def _run(
    frame: Call,
    replay: Collector,
    selection: Selection | None,
    args: list[Any],
    kwargs: dict[str, Any],
    watch: Watch | None,
) -> Any:
    skipping, local.skipping = local.skipping, selection is not None
    local.units.append(frame.site.name)
    push_hooks(replay.packer(watch), replay.unpack)
    try:
        if selection is not None:
            with SkipMode(selection, frame.kept):
                return _call(frame, args, kwargs)
        elif frame.contexts is None and frame.ops is None and watch is None:
            return _call(frame, args, kwargs)
        else:
            with contextlib.ExitStack() as stack:
                if frame.contexts is not None:
                    stack.enter_context(frame.contexts[1])
                    stack.enter_context(ambient.device_as(frame.device))
                if not frame.reached.is_compiled():
                    stack.enter_context(SparseProducts())
                if watch is not None:
                    stack.enter_context(watch)
                if frame.ops is not None:
                    stack.enter_context(OpNames(replay.ops))
                return _call(frame, args, kwargs)
    except Stop:
        return None
    finally:
        local.skipping = skipping
        pop_hooks()
        local.units.pop()


def _call(frame: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Call the forward with the context variables of its call; those that it sets are gone afterwards."""
    return frame.context.copy().run(frame.fn, *args, **kwargs)
