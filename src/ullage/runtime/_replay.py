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
        except Stale as stale:
            _note_stale(frame, str(stale))
        except ReplayError:
            raise
        except Exception as error:  # torch refuses a placeholder in many ways; what is the unit's own comes again
            _note_stale(frame, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            if _proven(frame, store, selection):
                frame.site.skipped += selection.skipped
                return store
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
    if ambient.autocasting():
        # a skipped cast would stay in the cache of the region that backward is called in
        frame.site.say("full replay: backward is called under autocast", warn=False)
        return None
    selection = known.selection
    # before its proof a log serves only the call that has the digests to prove it
    if selection.refusal or not (known.proof.done or known.proof.belongs_to(frame)):
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
        if known.proof.belongs_to(frame):
            known.proof.done = True
        return True
    known.selection = Selection(
        frozenset(), frozenset(), (), 0, f"its selective replay gave other values (saved tensor {bad})"
    )
    frame.site.say(f"full replay: {known.selection.refusal}")
    return False


def _differing(frame: Frame, store: dict[int, Any]) -> int | None:
    if not frame.digests:
        return None
    # what the unit's forward writes to is what the plain step's backward would find now, too: not what was saved
    state = frame.entry.values if frame.entry is not None else ()
    written = {o.untyped_storage()._cdata for o, _ in state if isinstance(o, Tensor)}
    with quiet():
        for i, wanted in frame.digests.items():
            if (
                wanted is None
                or not isinstance(store.get(i), Tensor)
                or (written and store[i].untyped_storage()._cdata in written)
            ):
                continue
            if digest(store[i]) != wanted:
                return i
    return None


def _check_values(frame: Frame, store: dict[int, Any]) -> None:
    bad = _differing(frame, store)
    if bad is None:
        if frame.digests:
            frame.site.shared.proof.done = True
        return
    shape = tuple(store[bad].shape)
    what = f"its replay gave other values than its forward (saved tensor {bad}, shape {shape})"
    why = "state or random draws that ullage can't see, or an op that is not deterministic"
    if frame.options.determinism_check == "values":
        raise ReplayError(f"{frame.site.name}: {what}: {why}; keep this unit, or make it deterministic")
    frame.site.say(f"{what}: {why}. Gradients may differ from the plain step's")


class _Replay:
    """One attempt: what its pack hook has collected, and the checks that need the whole of it.

    Args:
        frame: the call.
        selection: what to skip, or None for all of it.
    """

    def __init__(self, frame: Frame, selection: Selection | None) -> None:
        self.frame, self.selection, self.name = frame, selection, frame.site.name
        self.store: dict[int, Any] = {}
        self.versions: list[int] = []
        self.total = len(frame.notes)
        self.left = self.total - len(frame.kept) + len(selection.checked) if selection is not None else 0
        self.stops = frame.options.early_stop or not frame.complete
        self.checks = frame.options.determinism_check != "none" or selection is not None
        self.ops: list[str] = []

    def packer(self) -> Any:
        """The pack hook: check against forward's note, collect, stop when everything is there."""
        return self._full() if self.selection is None else self._selective(self.selection)

    def _full(self) -> Any:
        store, version, notes = self.store, self.versions.append, self.frame.notes
        last, checks, stops = self.total - 1, self.checks, self.stops

        def pack(x: Tensor) -> int:
            i = len(store)
            if i > last:
                return self._more(i)
            if (x.shape, x.stride(), x.dtype, x.device) != notes[i] and checks:
                self._differs(i, x)
            store[i] = x
            version(x._version)
            if i == last and stops:
                raise _Stop
            return i

        return pack

    def _selective(self, selection: Selection) -> Any:
        store, version, notes, kept = self.store, self.versions.append, self.frame.notes, self.frame.kept
        checked, last = selection.checked, self.total - 1
        i = -1

        def pack(x: Tensor) -> int:
            nonlocal i
            i += 1
            if i > last or not self.left:
                return self._more(i)
            if (x.shape, x.stride(), x.dtype, x.device) != notes[i]:
                self._differs(i, x)
            if i not in kept:
                if type(x) is Placeholder:
                    raise Stale(f"saved tensor {i} at {source_line()} was skipped")
                store[i] = x
                version(x._version)
            elif i in checked:
                self._check_kept(i, x, kept[i][0])
            else:
                return i
            self.left -= 1
            if not self.left and self.stops:
                raise _Stop
            return i

        return pack

    def _check_kept(self, i: int, x: Tensor, kept: Tensor) -> None:
        same = type(x) is not Placeholder and x.untyped_storage()._cdata == kept.untyped_storage()._cdata
        if not same or x.storage_offset() != kept.storage_offset():
            raise Stale(f"saved tensor {i} at {source_line()} is not the one that was kept")

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
        if found is None and self.frame is not None and i in self.frame.kept:
            found = self.frame.kept[i][0]
        if found is None:
            raise ReplayError(f"{self.name}: backward of a replay's own graph, after the replay")
        return found  # type: ignore[no-any-return]

    def note_modified(self) -> None:
        """While state is still the unit's own: which saved tensors has it written to since?"""
        store = self.store
        if [x._version for x in store.values()] != self.versions:
            for (i, x), version in zip(list(store.items()), self.versions, strict=True):
                if x._version != version:  # told only if backward asks for it, as by autograd
                    store[i] = Modified(x.shape)

    def finish(self) -> dict[int, Any]:
        """What was collected, after the checks that need the whole replay."""
        frame, store = self.frame, self.store
        if self.left:
            raise Stale("fewer tensors are saved than in forward")
        if self.selection is None and len(store) < self.total and self.checks:
            raise self._error(f"its forward saved {self.total} tensors, its replay {len(store)}")
        if frame.kept and self.selection is None:
            return {i: x for i, x in store.items() if i not in frame.kept}
        return dict(store)

    def close(self) -> None:
        """The replay's graph holds the hooks, and so this object: it must hold neither that graph's tensors nor the frame."""
        self.store.clear()
        self.frame = None  # type: ignore[assignment]


def _attempt(frame: Frame, selection: Selection | None) -> dict[int, Any]:
    replay = _Replay(frame, selection)
    if selection is None or not local.units:
        frame.site.replays += 1
    if frame.on_replay is not None:
        frame.on_replay()
    grad = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)
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
        return replay.finish()
    finally:
        replay.close()
        local.quiet = quiet_before
        torch._C._set_grad_enabled(grad)
        for put, state in before:
            put(state)


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
    skipping, local.skipping = local.skipping, selection is not None
    local.units.append(frame.site.name)
    push_hooks(replay.packer(), replay.unpack)
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
        local.units.pop()
