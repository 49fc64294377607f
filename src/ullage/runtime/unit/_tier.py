"""Offload saved tensors between forward and backward, and bring them back.

A storage is moved once, however many saved tensors are views of it; each of them comes back as the same view of one buffer.
These tensors of a unit stay in memory:

- leaves that require grad (parameters), views of them, and tensors that the unit's module or its other arguments hold;
- tensors smaller than a block of the store, or on a device that the store does not serve;
- subclasses, and tensors that are not plain strided ones.

One storage may have several version counters (the chunks that `unsafe_chunk` makes in recurrent cells; `.data`). A storage counts as
sent only for tensors that share the counter of the tensor that sent it.

When backward asks for a tensor, the ones that it will ask for next (`_ahead`) are prefetched; the store bounds the bytes that come
back before their use. If `get` waits, they are prefetched before it, so that they travel meanwhile; otherwise after it, because
the tensor that is needed now would queue behind them.
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

LEAST_BYTES = 4096  # a block of the disk store: a smaller tensor would take a whole block, and a transfer of its own


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
    """One offloaded storage. The store frees its place when nobody holds this object any more."""

    __slots__ = ("__weakref__", "_left", "_version", "back", "number", "site", "ticket", "users")

    def __init__(self, ticket: Ticket, number: int, site: Sender) -> None:
        self.ticket, self.number, self.site = ticket, number, site
        self.users = 0  # saved tensors in this storage
        self._left = 0  # saved tensors that have not asked for it since it came back
        self.back: Tensor | None = None  # the bytes in memory, until the last saved tensor has asked
        self._version = 0

    def fetch(self) -> Tensor:
        """Return the bytes as flat uint8: brought back once for all saved tensors in them, held until the last has asked.

        Raises:
            OffloadError: the store can't bring them back.
        """
        if self.back is None or self.back._version != self._version:
            site = self.site  # the store may call `late` later, so it must not hold the parcel

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
    """Stands for an offloaded saved tensor: which view of which parcel it is."""

    __slots__ = ("_layout", "_tier", "_version", "parcel", "shape")

    def __init__(self, tier: Tier, parcel: Parcel, x: Tensor) -> None:
        self._tier, self.parcel, self.shape = tier, parcel, x.shape
        self._layout = x.dtype, x.stride(), int(x.storage_offset())
        parcel.users += 1
        self._version = x._version  # when it was sent; the store checks that nobody writes to it on its way

    def tensor(self) -> Tensor:
        """Bring the saved tensor back.

        Raises:
            OffloadError: the store can't bring it back.
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
    """Return a tensor's whole storage as flat uint8, with x's version counter."""
    return x.detach().as_strided((x.untyped_storage().nbytes() // x.dtype.itemsize,), (1,), 0).view(torch.uint8)


class _Counter:
    """A tensor's version counter, without its memory."""

    __slots__ = ("_witness",)

    def __init__(self, x: Tensor) -> None:
        self._witness = x.detach()
        self._witness.data = torch.empty(0, dtype=x.dtype, device=x.device)  # the counter stays, the storage goes

    def is_of(self, x: Tensor) -> bool:
        """Does this tensor share the counter? Found out by moving the counter, and putting it back."""
        before, mine = x._version, self._witness._version
        set_versions((self._witness,), (mine + 1,))
        try:
            return x._version != before
        finally:
            set_versions((self._witness,), (mine,))


class Tier(Apart):
    """A store, for the saved tensors of units.

    Args:
        store: the store that takes the storages.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._parcels: dict[int, tuple[ReferenceType[UntypedStorage], ReferenceType[Parcel], int, _Counter]] = {}
        self._order: list[ReferenceType[Parcel]] = []
        self._ahead = Ahead()
        self._lock = threading.Lock()

    def pack(self, x: Tensor, site: Sender) -> Away | None:
        """Offload a saved tensor's storage; None if the tensor must stay in memory.

        Raises:
            OffloadError: the store has no room for it, or fails.
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
            ticket = self.store.put(_flat(x))  # the store sees by the version whether somebody writes to it meanwhile
            counter = _Counter(x)
        site.sent_bytes += size
        totals.sent += size
        with self._lock:
            while self._order and self._order[-1]() is None:  # numbers at the end whose parcels are gone are used again
                self._order.pop()
                self._ahead.forget_last()
            parcel = Parcel(ticket, self._ahead.left(id(site)), site)
            self._order.append(ref(parcel))
            gone = ref(storage, lambda _: self._parcels.pop(key, None))
            self._parcels[key] = gone, ref(parcel), x._version, counter
        return Away(self, parcel, x)

    def foresee(self, parcel: Parcel) -> None:
        """Backward is about to ask for a parcel: prefetch those that it will ask for next."""
        with self._lock:
            todo = [other for k in self._ahead.asked(parcel.number) if (other := self._order[k]()) is not None]
        for other in todo:
            if other.back is None:
                other.ticket.prefetch()


def tensor_of(kept: Any) -> Any:
    """Return a kept tensor; bring it back first if it was offloaded."""
    return kept.tensor() if type(kept) is Away else kept


def brought_back(kept: dict[int, tuple[Any, int]], index: int) -> Any:
    """Return one of a frame's kept tensors. An offloaded one stays in memory from now on: backward needs it soon after the replay."""
    tensor = kept[index][0]
    if type(tensor) is Away:
        tensor = tensor.tensor()
        kept[index] = tensor, tensor._version
    return tensor


def movable(x: Tensor, resident: Iterable[int]) -> bool:
    """May a saved tensor be offloaded? `resident`: keys of storages that something else holds anyway."""
    if kind_of(x) == LEAF:
        return False
    base = x._base
    if base is not None and kind_of(base) == LEAF:
        return False
    return x.untyped_storage()._cdata not in resident


def resident_keys(roots: Sequence[Any], args: Iterable[Any]) -> set[int]:
    """Return the keys of storages held by a unit's modules, and of arguments that were not computed with gradients."""
    found = set()
    for t in Reached(roots).tensors():
        found.add(t.untyped_storage()._cdata)
    for a in args:
        if isinstance(a, Tensor) and a.layout is torch.strided and kind_of(a) != IN_GRAPH:
            found.add(a.untyped_storage()._cdata)
    return found


class _Waiting:
    """Stands for a saved tensor that its kernel may fill only after autograd saved it (`_fills`): it is offloaded at the next op."""

    __slots__ = ("saved",)

    def __init__(self, x: Tensor) -> None:
        self.saved: Any = (x.detach(), x._version)

    def leave(self, site: Sender) -> None:
        tensor, version = self.saved
        if tensor._version == version:  # otherwise it stays, and backward raises the error that names it
            self.saved = site.send(tensor) or self.saved


def run_offloaded(site: Sender, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a unit's forward and offload its saved tensors; there is no replay.

    Raises:
        OffloadError: no store was given, or it can't take a tensor; in backward, if it can't bring one back.
    """
    if site.tier is None:
        raise OffloadError(f"{site.name}: its saved tensors are to be offloaded, but no store was given")
    resident = resident_keys(roots_of(call), tree_flatten((args, kwargs))[0])
    waiting: list[_Waiting] = []
    node = 0  # number of autograd's next node: it changes at the next op, when the op that saved the waiting tensors has run

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
