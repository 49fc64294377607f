"""The interface of one call of a unit, for the rooms that work on it: pack hooks, learning, replay, sweeps.

Idea: `Frame` stands above those rooms and calls into them, so they can't import it. They are written on this protocol, and the
imports of the runtime form no circle (`scripts/circles.py`).

Invariant: `Frame` is the only implementation, and it stays one object from the forward until autograd drops the unit's last
saved tensor.

Known weakness: attributes whose classes live in rooms above this one (`reads`, `around`) are typed `Any` or `Sequence[Any]`, so
mypy checks less there than in `Frame`. The protocol is wide because four rooms write to a frame.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol
from weakref import ReferenceType

from torch import Tensor

from ullage.runtime.ambient import _ambient as ambient
from ullage.runtime.state._reach import Reached
from ullage.runtime.state._state import State
from ullage.runtime.tensors._jagged import Rows
from ullage.runtime.tensors._memory import Back
from ullage.runtime.tensors._notes import Notes
from ullage.runtime.unit._inputs import Inputs
from ullage.runtime.unit._options import Options
from ullage.runtime.unit._place import Place
from ullage.runtime.unit._site import Known, Site
from ullage.runtime.unit._tier import Away


class Call(Protocol):
    """See `ullage.runtime.forward._frame.Frame` for the meaning of its attributes."""

    site: Site
    options: Options
    fn: Any
    on_replay: Callable[[], None] | None
    complete: bool
    stale: bool
    known: Known | None
    entry: State | None
    left: Sequence[int]
    contexts: tuple[Any, Any] | None
    digests: dict[int, bytes | None] | None
    ops: list[str] | None
    signature: Hashable
    kinds: Hashable
    unseen: str
    kept: dict[int, tuple[Tensor | Away, int]]
    held: dict[int, Tensor | None]
    given: dict[int, Tensor]
    leaves: Mapping[int, ReferenceType[Tensor]]
    restored: Mapping[int, str]
    rows: Mapping[int, Rows]
    around: Sequence[Any]
    around_written: Sequence[Any]
    watched: Sequence[tuple[Tensor, int]]
    reads: Any
    back: Back | None
    previous: Call | None
    place: Place
    expected: Notes
    notes: Notes
    count: Callable[[], int]
    odd: Notes | None
    late: dict[int, tuple[Tensor, int]]
    unsent: list[int]
    flags: ambient.Flags
    device: Any
    context: contextvars.Context
    reached: Reached
    roots: Any
    inputs: Inputs
    rng: Any

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], pack: Any) -> Any:
        """Call the unit under a pack hook."""

    def settle(self) -> bool:
        """See `Frame.settle`."""

    def keep_all(self) -> None:
        """Keep every saved tensor: this call gets no replay."""

    def noted(self) -> Notes:
        """Return the notes of the tensors that this forward has saved."""

    def note_buffers(self, buffers: list[Tensor]) -> None:
        """Copy or watch buffers that no call has changed so far."""

    def finish(self) -> None:
        """Close a forward that raised nothing."""

    def digests_of(self, saved: Mapping[int, tuple[Tensor | Away, int]]) -> dict[int, bytes | None]:
        """Return the digests of saved tensors."""

    def take(self, store: dict[int, Any]) -> None:
        """Hold the tensors that a replay has rebuilt, for the rest of this backward."""

    def state_names(self) -> str:
        """Name the state that the unit's forward changes, for messages."""
