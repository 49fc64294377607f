"""The pack hook of a replay: compare each saved tensor with the note of the forward, and collect it."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor

from ullage._errors import ReplayError
from ullage._source import source_line
from ullage.runtime.ambient._local import local, quiet
from ullage.runtime.ops._debug import first_difference
from ullage.runtime.ops._select import Selection
from ullage.runtime.ops._watch import Watch
from ullage.runtime.replay._skip import Placeholder, Stale
from ullage.runtime.tensors._fills import may_be_unfilled
from ullage.runtime.tensors._jagged import with_rows
from ullage.runtime.tensors._memory import copy_of
from ullage.runtime.tensors._notes import Check, meta_of
from ullage.runtime.unit._call import Call
from ullage.runtime.unit._modified import Modified
from ullage.runtime.unit._tier import brought_back, tensor_of

_version = attrgetter("_version")


class Stop(BaseException):
    """Ends a replay once everything is rebuilt. Not an `Exception`: the unit's own handlers must not catch it."""


class Collector:
    """One attempt at a replay: the tensors that its pack hook has collected, and the checks at its end.

    Args:
        frame: the call.
        selection: ops to skip, or None to run all of them.
        whole: "": end as soon as everything is rebuilt; "recorded": run to the end for the unit's output, too; "dropped": run
            to the end for the output only.
        copies: copy the arguments of inner units, because the unit writes to them afterwards.
    """

    def __init__(self, frame: Call, selection: Selection | None, whole: str = "", copies: bool = False) -> None:
        self.frame, self.selection, self.name = frame, selection, frame.site.name
        self.store: dict[int, Any] = {}
        self.versions: list[int] = []
        self.notes = frame.noted()
        self.total = len(self.notes)
        self.left = self.total - len(frame.kept) + len(selection.checked) if selection is not None else 0
        early = frame.options.early_stop and not frame.site.fills
        self.stops = not whole and (early or not frame.complete)
        self.drew = bool(frame.rng)  # without a draw no kernel (dropout, RReLU) fills noise after it was saved
        self.drops, self.copies = whole == "dropped", copies
        self.seen = 0
        self.checks = frame.options.determinism_check != "none" or selection is not None
        self.ops: list[str] = []

    def packer(self, watch: Watch | None) -> Any:
        """Return the pack hook: it compares with the forward's note, collects, and stops when everything is rebuilt."""
        if self.drops:
            return self._dropping()
        pack = self._full() if self.selection is None else self._selective(self.selection)
        if watch is not None:
            pack = self._watched(pack, watch)
        return self._copying(pack, watch) if self.copies else pack

    def _watched(self, pack: Any, watch: Watch) -> Any:
        def watched(x: Tensor) -> int:
            try:
                return pack(x)  # type: ignore[no-any-return]
            finally:  # also when `pack` ends the replay, at the last tensor
                name, last = watch.name(x), next(reversed(self.store), -1)
                if name is not None and self.store.get(last) is x:
                    self.store[last] = Modified(x.shape, name, x._version, x, local.holding)

        return watched

    def _copying(self, pack: Any, watch: Watch | None) -> Any:
        def copying(x: Tensor) -> int:
            if local.holding and (watch is None or watch.name(x) is None):
                x = copy_of(x)  # `watch` sees the copy as it sees any new tensor
            return pack(x)  # type: ignore[no-any-return]

        return copying

    def _full(self) -> Any:
        store, version, last, stops = self.store, self.versions.append, self.total - 1, self.stops
        checks, differs = self.notes.checks_in("full"), self._differs
        drew, notes = self.drew, self.notes
        i = -1

        def pack(x: Tensor) -> int:
            nonlocal i
            i += 1
            if i > last:
                return self._more(i)
            if not checks[i](x):
                differs(i, x, checks)
            store[i] = x
            version(x._version)
            if i == last and stops and not (drew and may_be_unfilled(store, notes, i)):
                raise Stop
            return i

        return pack

    def _dropping(self) -> Any:
        last, checks, differs = self.total - 1, self.notes.checks_in("full"), self._differs
        i = -1

        def pack(x: Tensor) -> int:
            nonlocal i
            i += 1
            self.seen = i + 1
            if i > last:
                return self._more(i)
            if not checks[i](x):
                differs(i, x, checks)
            return i

        return pack

    def _selective(self, selection: Selection) -> Any:
        store, version, kept, last = self.store, self.versions.append, self.frame.kept, self.total - 1
        checks, differs, checked = self.notes.checks_in("selective"), self._differs, selection.checked
        i = -1

        def pack(x: Tensor) -> int:
            nonlocal i
            i += 1
            if i > last or not self.left:
                return self._more(i)
            if not checks[i](x):
                differs(i, x, checks)
            if i not in kept:
                if type(x) is Placeholder:
                    raise Stale(f"saved tensor {i} at {source_line()} was skipped")
                store[i] = x
                version(x._version)
            elif i in checked:
                self._check_kept(i, x, brought_back(kept, i))
            else:
                return i
            self.left -= 1
            if not self.left and self.stops and not (self.drew and may_be_unfilled(store, self.notes, i)):
                raise Stop
            return i

        return pack

    def _check_kept(self, i: int, x: Tensor, kept: Tensor) -> None:
        same = type(x) is not Placeholder and x.untyped_storage()._cdata == kept.untyped_storage()._cdata
        if not same or x.storage_offset() != kept.storage_offset():
            raise Stale(f"saved tensor {i} at {source_line()} is not the one that was kept")

    def _more(self, i: int) -> int:
        if self.stops:
            raise Stop  # again: the unit has swallowed the first one
        if i >= self.total:
            if self.selection is not None:
                raise Stale("more tensors are saved than in forward")
            if self.checks:
                raise self._error(f"its replay saves more than the {self.total} tensors that its forward saved")
        return i

    def _differs(self, i: int, x: Tensor, checks: list[Check]) -> None:
        """Compare from Python, the guard having said no; raise an error, or Stale in a selective replay, if it differs."""
        if self.notes.equal(i, x, checks):
            return
        if self.selection is not None:
            raise Stale(f"saved tensor {i} at {source_line()} has another shape, stride or dtype")
        if not self.checks:
            return
        shape, stride, dtype, device = self.notes[i]
        raise self._error(
            f"saved tensor {i} is {x.dtype} {tuple(x.shape)} with strides {meta_of(x)[1]} on {x.device} in the replay, "
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
        """Unpack for a backward that runs inside the unit's own forward."""
        found: Any = self.store.get(i)
        if found is None and self.frame is not None and i in self.frame.kept:
            found = tensor_of(self.frame.kept[i][0])
        if found is None:
            raise ReplayError(f"{self.name}: backward of a replay's own graph, after the replay")
        # `Watch` follows what this backward computes from a changed tensor, too
        given: Any = found.now if isinstance(found, Modified) else found
        return given  # type: ignore[no-any-return]

    def note_modified(self) -> None:
        """Mark saved tensors that the unit has written to since; call it before its state is put back, which writes too."""
        store = self.store
        if list(map(_version, store.values())) != self.versions:
            for (i, x), version in zip(list(store.items()), self.versions, strict=True):
                if x._version != version:
                    store[i] = Modified(x.shape)

    def finish(self) -> dict[int, Any]:
        """Return what was collected, after the checks that need the whole replay."""
        frame, store = self.frame, self.store
        if self.left:
            raise Stale("fewer tensors are saved than in forward")
        seen = self.seen if self.drops else len(store)
        # even with determinism_check="none": backward would ask for a tensor that is not there
        if self.selection is None and seen < self.total:
            raise self._error(f"its forward saved {self.total} tensors, its replay {seen}")
        if frame.rows:
            self._put_rows()
        if frame.kept and self.selection is None:
            return {i: x for i, x in store.items() if i not in frame.kept}
        return dict(store)

    def _put_rows(self) -> None:
        """Give jagged tensors the offsets of the forward: to autograd, offsets that the replay makes have another ragged size."""
        store = self.store
        with quiet():
            for i, rows in self.frame.rows.items():
                if not isinstance(store.get(i), Tensor):
                    continue
                found = with_rows(store[i], rows)
                if found is None:
                    raise self._error(f"saved tensor {i} is jagged, with other rows in the replay than in forward")
                store[i] = found

    def close(self) -> None:
        """Drop the tensors and the frame: the replay's graph holds the hooks, and so this object."""
        self.store.clear()
        self.frame = None  # type: ignore[assignment]
