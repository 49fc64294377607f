"""Offload saved tensors between forward and backward, and bring them back.

What is moved is a storage, once, however many saved tensors are views of it; each of them comes back as the same view of
one buffer. Which tensors of a unit may go:

- not leaves that require grad (parameters) nor views of them, nor what the unit's module or its other arguments hold;
- not what is smaller than a block of the store or on another device than it is for, nor anything but plain strided tensors, nor subclasses.

One storage may have several version counters (the chunks of `unsafe_chunk`, as cells of recurrent networks make them; `.data`). That it has left
already counts only for who shares the counter of the tensor that sent it.

When backward asks for one, those that it will ask for next (`_ahead`) are prefetched. The store bounds how many bytes come ahead of their use. They are asked for before the wait, if the thread waits, and else after
what is needed now, which would queue behind them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, UntypedStorage, nn

from ullage._errors import OffloadError, ReplayError
from ullage._torch import FakeTensor, pop_hooks, push_hooks, set_versions, tree_flatten
from ullage.offload import Store, Ticket
from ullage.runtime.ambient._local import Apart, quiet
from ullage.runtime.ambient._totals import totals
from ullage.runtime.state._reach import Reached, roots_of
from ullage.runtime.tensors._fills import is_fresh, mark
from ullage.runtime.tensors._memory import IN_GRAPH, LEAF, kind_of
from ullage.runtime.unit._ahead import Ahead

LEAST_BYTES = 4096  # a block of the disk store


class Sender(Protocol):
    """The unit's site whose saved tensors are offloaded."""

    name: str
    tier: Any
    late: int
    sent_bytes: int

    def send(self, x: Tensor) -> Away | None:
        """Offload a saved tensor, if it may be."""


_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class Parcel:
    """One storage that has left. Its place is given back when nobody holds it any more."""

    __slots__ = ("__weakref__", "_left", "_version", "back", "number", "site", "ticket", "users")

    def __init__(self, ticket: Ticket, number: int, site: Sender) -> None:
        self.ticket, self.number, self.site = ticket, number, site
        self.users = 0  # saved tensors in this storage
        self._left = 0  # of these, how many have not asked for it since it came back
        self.back: Tensor | None = None  # while some of them have not asked
        self._version = 0

    def fetch(self) -> Tensor:
        """The bytes, flat uint8. They come back once for all saved tensors in them and are held until the last has asked.

        Raises:
            OffloadError: they can't be had.
        """
        if self.back is None or self.back._version != self._version:
            site = self.site  # a store may call later: that must not hold the parcel

            def late() -> None:
                site.late += 1
                totals.late += 1

            self.back, self._left = self.ticket.get(late), self.users
            self._version = self.back._version
        flat = self.back
        self._left -= 1
        if self._left <= 0:
            self.back = None
        return flat


class Away:
    """In the place of a saved tensor: which view of which parcel."""

    __slots__ = ("_layout", "_tier", "_version", "parcel", "shape")

    def __init__(self, tier: Tier, parcel: Parcel, x: Tensor) -> None:
        self._tier, self.parcel, self.shape = tier, parcel, x.shape
        self._layout = x.dtype, x.stride(), int(x.storage_offset())
        parcel.users += 1
        self._version = x._version  # of what left; that it was not written to on its way is the store's to see

    def tensor(self) -> Tensor:
        """The saved tensor.

        Raises:
            OffloadError: it can't be had.
        """
        with quiet(), torch.no_grad():
            blocks, first = self._tier.store.get_blocks, self.parcel.back is None
            if first and blocks:
                self._tier.foresee(self.parcel)
            flat = self.parcel.fetch()
            if first and not blocks:
                self._tier.foresee(self.parcel)
            dtype, stride, offset = self._layout
            return flat.view(dtype).as_strided(self.shape, stride, offset)


def _flat(x: Tensor) -> Tensor:
    """A tensor's whole storage, as flat uint8. It has x's version counter."""
    return x.detach().as_strided((x.untyped_storage().nbytes() // x.dtype.itemsize,), (1,), 0).view(torch.uint8)


class _Counter:
    """A tensor's version counter, without its memory."""

    __slots__ = ("_witness",)

    def __init__(self, x: Tensor) -> None:
        self._witness = x.detach()
        self._witness.data = torch.empty(0, dtype=x.dtype, device=x.device)  # the counter stays, the storage goes

    def is_of(self, x: Tensor) -> bool:
        """Does this tensor have the same counter? Seen by moving it, and putting it back."""
        before, mine = x._version, self._witness._version
        set_versions((self._witness,), (mine + 1,))
        try:
            return x._version != before
        finally:
            set_versions((self._witness,), (mine,))


class Tier(Apart):
    """A store as units see it.

    Args:
        store: where storages go.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._parcels: dict[int, tuple[ReferenceType[UntypedStorage], ReferenceType[Parcel], int, _Counter]] = {}
        self._order: list[ReferenceType[Parcel]] = []
        self._ahead = Ahead()
        self._lock = threading.Lock()

    def pack(self, x: Tensor, site: Sender) -> Away | None:
        """Have a saved tensor of a unit's, and its storage, leave; None if it is not one that can.

        Raises:
            OffloadError: the store can't take it.
        """
        if type(x) not in _PLAIN or x.layout is not torch.strided or x.is_conj() or x.is_neg() or x.is_quantized:
            return None
        storage = x.untyped_storage()
        size = storage.nbytes()
        if not self.store.takes(x.device):
            return None
        if size < LEAST_BYTES or size % x.dtype.itemsize:
            return None
        key = storage._cdata
        with quiet(), torch.no_grad():
            known = self._parcels.get(key)
            if known is not None and known[0]() is storage and known[2] == x._version and known[3].is_of(x):
                parcel = known[1]()
                if parcel is not None:
                    return Away(self, parcel, x)
            ticket = self.store.put(_flat(x))  # which sees by the version whether somebody writes to it meanwhile
            counter = _Counter(x)
        site.sent_bytes += size
        totals.sent += size
        with self._lock:
            while self._order and self._order[-1]() is None:  # those at the end that are gone are forgotten
                self._order.pop()
                self._ahead.forget_last()
            parcel = Parcel(ticket, self._ahead.left(id(site)), site)
            self._order.append(ref(parcel))
            gone = ref(storage, lambda _: self._parcels.pop(key, None))
            self._parcels[key] = gone, ref(parcel), x._version, counter
        return Away(self, parcel, x)

    def foresee(self, parcel: Parcel) -> None:
        """A parcel is about to be asked for: prefetch those that will be asked for after it."""
        with self._lock:
            todo = [other for k in self._ahead.asked(parcel.number) if (other := self._order[k]()) is not None]
        for other in todo:
            if other.back is None:
                other.ticket.prefetch()


def tensor_of(kept: Any) -> Any:
    """What is kept in memory, or what left and comes back now."""
    return kept.tensor() if type(kept) is Away else kept


def brought_back(kept: dict[int, tuple[Any, int]], index: int) -> Any:
    """One of a frame's kept tensors, which stays in memory from now on: a replay needs it, and backward soon after."""
    tensor = kept[index][0]
    if type(tensor) is Away:
        tensor = tensor.tensor()
        kept[index] = tensor, tensor._version
    return tensor


def movable(x: Tensor, resident: Iterable[int]) -> bool:
    """May a saved tensor be offloaded? `resident`: keys of storages that stay anyway."""
    if kind_of(x) == LEAF:
        return False
    base = x._base
    if base is not None and kind_of(base) == LEAF:
        return False
    return x.untyped_storage()._cdata not in resident


def resident_keys(roots: Sequence[Any], args: Iterable[Any]) -> set[int]:
    """Keys of storages that a unit's modules hold, and of arguments that were not computed with gradients."""
    found = set()
    for t in Reached(roots).tensors():
        found.add(t.untyped_storage()._cdata)
    for a in args:
        if isinstance(a, Tensor) and a.layout is torch.strided and kind_of(a) != IN_GRAPH:
            found.add(a.untyped_storage()._cdata)
    return found


class _Waiting:
    """In the place of a saved tensor that the kernel which saved it may fill only now (`_fills`): it leaves with the next op."""

    __slots__ = ("saved",)

    def __init__(self, x: Tensor) -> None:
        self.saved: Any = (x.detach(), x._version)

    def leave(self, site: Sender) -> None:
        tensor, version = self.saved
        if tensor._version == version:  # else backward says what happened
            self.saved = site.send(tensor) or self.saved


def run_offloaded(site: Sender, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a unit's forward and offload what it saves; no op runs again.

    Raises:
        OffloadError: there is no store, or it can't take it; in backward, if it can't give it back.
    """
    if site.tier is None:
        raise OffloadError(f"{site.name}: its saved tensors are to be offloaded, but no store was given")
    resident = resident_keys(roots_of(call), tree_flatten((args, kwargs))[0])
    waiting: list[_Waiting] = []
    node = 0  # the next one's number: it moves with the next op, when the one that saved what is waiting has run

    def pack(x: Tensor) -> Any:
        nonlocal node
        if waiting and mark() != node:
            leave()
        if not movable(x, resident):
            away = None
        elif is_fresh(x):
            node = mark()
            waiting.append(_Waiting(x))
            return waiting[-1]
        else:
            away = site.send(x)
        # detached: a node that saves its own output must not hold itself
        return away if away is not None else (x.detach() if x.grad_fn is not None else x, x._version)

    def leave() -> None:
        while waiting:
            waiting.pop(0).leave(site)

    def unpack(saved: Any) -> Tensor:
        if type(saved) is _Waiting:
            saved = saved.saved
        if type(saved) is Away:
            return saved.tensor()
        tensor, version = saved
        if tensor._version != version:
            raise ReplayError(
                f"{site.name}: a saved tensor of shape {tuple(tensor.shape)} was modified by an inplace operation after the "
                f"forward saved it (version {tensor._version}, expected {version}); the plain step would fail too"
            )
        return tensor  # type: ignore[no-any-return]

    push_hooks(pack, unpack)
    try:
        out = call(*args, **kwargs)
    finally:
        pop_hooks()
    leave()
    return out
