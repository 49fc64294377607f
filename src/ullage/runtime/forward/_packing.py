"""The pack hooks of a unit's forward.

They run once per saved tensor, which makes them the hottest code of the runtime; so they are closures over plain lists and dicts.
A forward that saves exactly what the expected notes say records only how many tensors there were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ullage._torch import count_modes
from ullage.runtime.ambient._local import local, quiet
from ullage.runtime.tensors._digest import comparable, digest
from ullage.runtime.tensors._fills import is_fresh
from ullage.runtime.tensors._jagged import is_jagged, rows_of
from ullage.runtime.tensors._memory import copy_of
from ullage.runtime.tensors._notes import Notes, meta_of
from ullage.runtime.unit._call import Call

if TYPE_CHECKING:
    from ullage.runtime.unit._tier import Away


Pack = Callable[[Tensor], int]


def packer(frame: Call, expected: Notes, keep: Any = (), away: Any = ()) -> Pack:
    """Return the pack hook of a forward: it compares each saved tensor with its note, keeps those in `keep`, digests the others if asked.

    Kept tensors whose index is in `away` are offloaded.
    """
    checks, i = expected.checks_in("forward"), -1
    frame.expected, digests = expected, frame.digests

    def pack(x: Tensor) -> int:
        nonlocal i
        i += 1
        try:
            if checks[i](x):
                return i
        except IndexError:
            pass
        note(i, x)
        return i

    def note(i: int, x: Tensor) -> None:
        nonlocal checks
        if is_jagged(x):
            frame.rows = {**frame.rows, i: rows_of(x)}
        if frame.odd is None and not expected.equal(i, x, checks):
            frame.odd, checks = Notes(expected[:i]), []
        if frame.odd is not None:
            frame.odd.append(meta_of(x))

    frame.count = lambda: i + 1
    if not keep and digests is None:
        return pack
    kept: dict[int, tuple[Tensor | Away, int]] = {}
    held: dict[int, Tensor | None] = {}
    frame.kept, frame.held = kept, held
    nested, site = count_modes() > 0, frame.site

    def pack_some(x: Tensor) -> int:
        i = pack(x)
        if i in keep:
            before = local.quiet
            if nested:
                local.quiet = True
            try:
                goes = i in away
                if goes and is_fresh(x):
                    frame.unsent.append(i)
                    goes = False
                left = site.send(x) if goes else None
                # detached: a node that saves its own output must not hold itself
                kept[i] = (left or x.detach(), x._version)
            finally:
                local.quiet = before
            if local.holding:
                held[i] = None
        elif digests is not None:
            if site.digests_last or is_fresh(x):
                with quiet():  # the op log of an outer unit must not contain this detach
                    frame.late[i] = x.detach(), x._version
            elif comparable(x):
                with quiet():
                    digests[i] = digest(x)
        return i

    return pack_some


def packer_of_all(frame: Call, saved: Callable[[Tensor], None] | None = None) -> Pack:
    """Return a pack hook that keeps everything and calls `saved` with each tensor."""
    pack = packer(frame, Notes())
    kept: dict[int, tuple[Tensor | Away, int]] = {}
    held: dict[int, Tensor | None] = {}
    given: dict[int, Tensor] = {}
    frame.kept, frame.held, frame.given = kept, held, given

    def pack_all(x: Tensor) -> int:
        i = pack(x)
        with quiet():
            kept[i] = (x.detach(), x._version)
            if x.grad_fn is None:
                given[i] = x
            if local.holding:
                held[i] = copy_of(x)
        if saved is not None:
            saved(x)
        return i

    return pack_all
