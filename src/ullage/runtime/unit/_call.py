"""One call of a unit as everything that works on it sees it; `Frame` is what it is.

What a frame holds of modules above this one is not typed here.
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
        """There will be no replay."""

    def noted(self) -> Notes:
        """What this forward has saved."""

    def note_buffers(self, buffers: list[Tensor]) -> None:
        """Buffers that no call has changed so far."""

    def finish(self) -> None:
        """The forward has gone well."""

    def digests_of(self, saved: Mapping[int, tuple[Tensor | Away, int]]) -> dict[int, bytes | None]:
        """Digests of saved tensors."""

    def take(self, store: dict[int, Any]) -> None:
        """Keep what a replay has rebuilt, for the rest of this backward."""

    def state_names(self) -> str:
        """What the unit's forward changes, for messages."""
