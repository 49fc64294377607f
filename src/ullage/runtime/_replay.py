"""Run a unit's forward again during backward, check it against what the forward noted, and collect what was dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullage._errors import ReplayError
from ullage._source import source_line
from ullage.runtime import _ambient as ambient
from ullage.runtime._debug import OpNames, first_difference
from ullage.runtime._digest import digest
from ullage.runtime._local import local, pop_hooks, push_hooks, quiet
from ullage.runtime._select import Selection
from ullage.runtime._skip import Placeholder, SkipMode, Stale

if TYPE_CHECKING:
    from ullage.runtime._frame import Frame


@dataclass(frozen=True)
class Modified:
    """In the place of a saved tensor that the unit itself writes to after it was saved."""

    shape: torch.Size


class _Stop(BaseException):
    """Everything is rebuilt. Not an `Exception`: the unit's own handlers must not catch it."""


def rebuild(frame: Frame) -> dict[int, Any]:
    """Rebuild what a frame dropped: selectively where that is proven, else in full.

    Raises:
        ReplayError: the replay is not the forward's.
    """
    frame.check_reads()
    selection = _usable(frame)
    if selection is not None:
        try:
            store = _attempt(frame, selection)
            if _proven(frame, store, selection):
                frame.site.skipped += selection.skipped
                return store
        except Stale as stale:
            _note_stale(frame, str(stale))
    store = _attempt(frame, None)
    _check_values(frame, store)
    return store


def _usable(frame: Frame) -> Selection | None:
    known = frame.known
    if known is None or not frame.complete:
        return None
    if frame.stale:
        _note_stale(frame, "what this call saved is not what the log says")
        return None
    if any(enabled for enabled, _ in ambient.read_flags()[: len(ambient.AUTOCAST_TYPES)]):
        # a skipped cast would stay in the cache of the region that backward is called in
        frame.site.say("full replay: backward is called under autocast", warn=False)
        return None
    selection = known.selection
    # before its proof a log serves only the call that has the digests to prove it
    if selection.refusal or not (known.trusted or frame.learning):
        return None
    return selection


def _note_stale(frame: Frame, why: str) -> None:
    frame.site.stale += 1
    frame.site.shared.forget(frame.signature)
    frame.site.say(f"a stale op log ({why}); what it dropped is rebuilt in full, the next call makes a new log")


def _proven(frame: Frame, store: dict[int, Any], selection: Selection) -> bool:
    """Compare with the digests, where there are some; a log whose replay gave other bits is not used again."""
    known = frame.known
    assert known is not None
    bad = _differing(frame, store)
    if bad is None:
        if frame.learning:
            known.trusted = True
        return True
    known.selection = Selection(
        frozenset(), frozenset(), (), 0, f"its selective replay gave other values (saved tensor {bad})"
    )
    frame.site.say(f"full replay: {known.selection.refusal}")
    return False


def _differing(frame: Frame, store: dict[int, Any]) -> int | None:
    if not frame.digests:
        return None
    with quiet():
        for i, wanted in frame.digests.items():
            if wanted is not None and isinstance(store.get(i), Tensor) and digest(store[i]) != wanted:
                return i
    return None


def _check_values(frame: Frame, store: dict[int, Any]) -> None:
    bad = _differing(frame, store)
    if bad is None:
        frame.site.shared.proven = True
        return
    shape = tuple(store[bad].shape)
    what = f"its replay gave other values than its forward (saved tensor {bad}, shape {shape})"
    why = "state or random draws that ullage can't see, or an op that is not deterministic"
    if frame.options.determinism_check == "values":
        raise ReplayError(f"{frame.site.name}: {what}: {why}; keep this unit, or make it deterministic")
    frame.site.say(f"{what}: {why}. Gradients may differ from the plain step's")


class _Replay:
    """One attempt; its pack hook checks and collects.

    Args:
        frame: the call.
        selection: what to skip, or None for all of it.
    """

    def __init__(self, frame: Frame, selection: Selection | None) -> None:
        self.frame, self.selection = frame, selection
        self.store: dict[int, Any] = {}
        self.versions: dict[int, int] = {}
        self.count, self.total = 0, frame.count
        self.checked = selection.checked if selection is not None else frozenset()
        self.left = self.total - len(frame.kept) + len(self.checked) if selection is not None else self.total
        self.stops = frame.options.early_stop or not frame.complete
        self.checks = frame.options.determinism_check != "none" or selection is not None
        self.over = False
        self.ops: list[str] = []

    def pack(self, x: Tensor) -> int:
        i = self.count
        self.count = i + 1
        if self.over or i >= self.total:
            return self._more(i)
        frame = self.frame
        if self.checks and (x.shape, x.stride(), x.dtype, x.device) != frame.notes[i]:
            self._differs(i, x)
        if self.selection is None:
            self.store[i], self.versions[i] = x, x._version
            self.left -= 1
        elif i not in frame.kept:
            if type(x) is Placeholder:
                raise Stale(f"saved tensor {i} at {source_line()} was skipped")
            self.store[i], self.versions[i] = x, x._version
            self.left -= 1
        elif i in self.checked:
            kept = frame.kept[i][0]
            if (
                x.untyped_storage()._cdata != kept.untyped_storage()._cdata
                or x.storage_offset() != kept.storage_offset()
            ):
                raise Stale(f"saved tensor {i} at {source_line()} is not the one that was kept")
            self.left -= 1
        if not self.left:
            self.over = True
            if self.stops:
                raise _Stop
        return i

    def _more(self, i: int) -> int:
        if self.stops:
            raise _Stop  # the unit has swallowed the first one
        if i >= self.total:
            if self.selection is not None:
                raise Stale("more tensors are saved than in forward")
            if self.checks:
                raise self._error(f"its replay saves more than the {self.total} tensors that its forward saved")
        return i

    def _differs(self, i: int, x: Tensor) -> None:
        shape, stride, dtype, device = self.frame.notes[i]
        if self.selection is not None:
            raise Stale(f"saved tensor {i} at {source_line()} has another shape, stride or dtype")
        raise self._error(
            f"saved tensor {i} is {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device} in the replay, "
            f"but was {dtype} {tuple(shape)} with strides {stride} on {device} in forward"
        )

    def _error(self, what: str) -> ReplayError:
        frame = self.frame
        where = f" at {line}" if (line := source_line()) else ""
        state = f" It changes {names}." if (names := frame.state_names()) else ""
        text = f"{frame.site.name}{where}: the replay differs from the forward: {what}.{state}"
        if frame.ops is not None:
            return ReplayError(text + first_difference(frame.ops, self.ops))
        return ReplayError(f"{text} Pass debug=True to see where they part")

    def unpack(self, i: int) -> Tensor:
        """For a backward inside the unit's own forward."""
        found = self.store.get(i)
        if found is None and i in self.frame.kept:
            found = self.frame.kept[i][0]
        if found is None:
            raise ReplayError(f"{self.frame.site.name}: backward of a replay's own graph, after the replay")
        return found  # type: ignore[no-any-return]

    def note_modified(self) -> None:
        """While state is still the unit's own: which saved tensors has it written to since?"""
        for i, version in self.versions.items():
            if self.store[i]._version != version:  # told only if backward asks for it, as by autograd
                self.store[i] = Modified(self.store[i].shape)

    def finish(self) -> dict[int, Any]:
        """What was collected, after the checks that need the whole replay."""
        frame = self.frame
        if self.left and self.selection is not None:
            raise Stale("fewer tensors are saved than in forward")
        if self.left and self.checks:
            raise self._error(f"its forward saved {self.total} tensors, its replay {self.count}")
        # detached: the replay's graph holds the frame, which would never be freed after an error in backward
        with quiet():
            store = {
                i: x if isinstance(x, Modified) else x.detach() for i, x in self.store.items() if i not in frame.kept
            }
        self.store = {}  # the replay's graph holds this object: it must not hold the graph
        return store


def _attempt(frame: Frame, selection: Selection | None) -> dict[int, Any]:
    replay = _Replay(frame, selection)
    if selection is None or not local.units:
        frame.site.replays += 1
    if frame.on_replay is not None:
        frame.on_replay()
    grad = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)
    local.units.append(frame.site.name)
    quiet_before, local.quiet = local.quiet, False
    before = [(source[1], source[0]()) for source, _ in frame.rng]
    try:
        # before the flags are set: it may start replays of outer units, which must not share an autocast cache with this one
        args, kwargs = frame.inputs.give()
        with _as_it_was(frame) if _differs_around(frame) else _nothing:
            for source, state in frame.rng:
                source[1](state)
            _run(frame, replay, selection, args, kwargs)
            replay.note_modified()
    except BaseException:
        replay.store = {}
        raise
    finally:
        for put, state in before:
            put(state)
        local.quiet = quiet_before
        local.units.pop()
        torch._C._set_grad_enabled(grad)
    try:
        return replay.finish()
    finally:
        replay.store = {}


_nothing = contextlib.nullcontext()


def _differs_around(frame: Frame) -> bool:
    return frame.entry is not None or frame.flags != ambient.read_flags()


@contextlib.contextmanager
def _as_it_was(frame: Frame) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(ambient.flags_as(frame.flags, ambient.read_flags()))
        if frame.entry is not None:
            stack.enter_context(frame.entry.seen())
        yield


def _run(frame: Frame, replay: _Replay, selection: Selection | None, args: list[Any], kwargs: dict[str, Any]) -> None:
    push_hooks(replay.pack, replay.unpack)
    skipping, local.skipping = local.skipping, selection is not None
    try:
        if selection is not None:
            with SkipMode(selection, frame.kept):
                frame.fn(*args, **kwargs)
        elif frame.contexts is None and frame.ops is None:
            frame.fn(*args, **kwargs)
        else:
            with contextlib.ExitStack() as stack:
                if frame.contexts is not None:
                    stack.enter_context(frame.contexts[1])
                if frame.ops is not None:
                    stack.enter_context(OpNames(replay.ops))
                frame.fn(*args, **kwargs)
    except _Stop:
        return
    finally:
        local.skipping = skipping
        pop_hooks()
