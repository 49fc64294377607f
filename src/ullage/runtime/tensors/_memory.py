"""Tell whether a tensor still has the memory it had, and put that memory back.

`p.data = ...` and `set_` give a tensor another storage, `p.data = p.data.t()` another way to read it. No dispatch mode sees these as
ops, and no version counts them. The checks made on every call cost a tenth of a microsecond per tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ullage._torch import DisableTorchDispatch, FakeTensor, count_modes, is_wrapped, is_zero_tensor, no_dispatch
from ullage._torch import fits_in as _fits_in
from ullage.runtime.tensors._notes import Check, guard_of, meta_of

OWN = (Tensor, torch.nn.Parameter)
_untyped = Tensor.untyped_storage
_offset: Any = Tensor.storage_offset
_ROWS, _COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_COMPRESSED = {torch.sparse_csr: _ROWS, torch.sparse_bsr: _ROWS, torch.sparse_csc: _COLUMNS, torch.sparse_bsc: _COLUMNS}
_MOST_CHECKS = 3  # torch's guards compare dispatch keys, which differ in forward, under autocast and in backward: one guard for each


def storage(t: Tensor) -> Any:
    """Return a tensor's storage; None for a sparse tensor, or a subclass that has none."""
    try:
        return t.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def storage_of(t: Tensor) -> int:
    """Return a key that tells living storages apart; 0 for a tensor that has none."""
    found = storage(t)
    return int(found._cdata) if found is not None else 0


def alias(t: Tensor) -> Tensor:
    """Return a tensor's memory under another name, as it is: a fake mode would make a fake tensor of a real one that a step reads."""
    if type(t) in OWN and count_modes():
        with DisableTorchDispatch():
            return t.detach()
    return t.detach()


def copy_of(t: Tensor) -> Tensor:
    """Return a detached copy that lies in its memory as the tensor does: `clone` gives a view with gaps or overlaps other strides."""
    copy = t.detach().clone()
    if (type(t) not in OWN and type(t) is not FakeTensor) or t.layout != torch.strided or t.is_nested:
        return copy
    shape, stride = t.shape, t.stride()
    if copy.stride() == stride or not t.numel():
        return copy
    span = t.detach().as_strided((_end(shape, stride, 0),), (1,), t.storage_offset())
    return span.clone().as_strided(shape, stride)


def same_storage(a: Any, b: Any) -> bool:
    """Are two storages the same, or both None?"""
    return a is b or (a is not None and b is not None and int(a._cdata) == int(b._cdata))


def same_memory(t: Tensor, data: Tensor) -> bool:
    """Does a tensor have the storage of `data`, with the same dtype, shape, strides and offset?"""
    if t.dtype != data.dtype or t.layout != data.layout:
        return False
    if type(t).__torch_dispatch__ is not no_dispatch and type(t) is not FakeTensor:  # a detached one is another wrapper
        return same_parts(t, data)
    if t.is_nested and t.layout == torch.strided:  # has no shape
        return same_storage(storage(t), storage(data))
    try:
        same = t.shape == data.shape and same_storage(t.untyped_storage(), data.untyped_storage())
        if t.layout != torch.strided:
            return same
        return same and t.storage_offset() == data.storage_offset() and t.stride() == data.stride()
    except RuntimeError:  # no one storage: sparse
        return same_parts(t, data)


def same_parts(t: Tensor, data: Tensor) -> bool:
    """Do two tensors made of inner tensors (sparse, subclasses) share the memory of these? True if their class does not name its parts."""
    if t.layout == torch.sparse_coo:
        return same_memory(t._indices(), data._indices()) and same_memory(t._values(), data._values())
    if t.layout in _COMPRESSED:
        return all(same_memory(getattr(t, n)(), getattr(data, n)()) for n in _COMPRESSED[t.layout])
    names = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else ()
    return type(t) is type(data) and all(same_memory(getattr(t, n), getattr(data, n)) for n in names)


NO_GRADIENT, IN_GRAPH, LEAF = 0, 1, 2


def kind_of(t: Tensor) -> int:
    """Return NO_GRADIENT, IN_GRAPH or LEAF: autograd allows a unit other in-place ops on each.

    One of several views that one op made (`chunk`, `split`) raises at any look at its graph once its base was written to. So does
    every op that uses it, but a plain step may pass it on unused.
    """
    if not t.requires_grad:
        return NO_GRADIENT
    try:
        return LEAF if t.is_leaf else IN_GRAPH
    except RuntimeError:
        return IN_GRAPH


def hides_graph(t: Tensor) -> bool:
    """Does torch raise at any look at this tensor's graph?"""
    try:
        _ = t.is_leaf
    except RuntimeError:
        return True
    return False


def has_memory(tensor: Tensor) -> bool:
    """Does a strided tensor have memory for its elements?

    Tensors that `torch.func` wraps and autograd's lazy zeros have none; FSDP's have none while FSDP has freed it.
    """
    if not tensor.numel():
        return True
    if is_zero_tensor(tensor) or is_wrapped(tensor):
        return False
    return tensor.untyped_storage().nbytes() >= _end(tensor.shape, tensor.stride(), int(tensor.storage_offset())) * (
        tensor.element_size()
    )


def _end(shape: Sequence[int], stride: Sequence[int], offset: int) -> int:
    """Return how many elements a storage must have for such a view."""
    return offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _meta(t: Tensor) -> tuple[Any, ...]:
    try:
        return (*meta_of(t), t.is_conj(), t.is_neg(), t.requires_grad)
    except RuntimeError:  # a nested tensor has no shape
        return (), (), t.dtype, t.device, False, False, t.requires_grad


def _is_plain(t: Tensor) -> bool:
    """Do dtype, shape, strides and offset say all of how to read its memory?"""
    strided = type(t) in OWN and t.layout == torch.strided and not t.is_nested
    return strided and not (t.is_conj() or t.is_neg() or t.is_quantized)


class Layout:
    """How some tensors lie in their storages. It is nearly always the same from call to call, and one call into C++ tells.

    Args:
        tensors: the tensors.

    Attributes:
        loose: indices of tensors that do not require grad: a later in-place write may give such a tensor a graph.
    """

    __slots__ = ("_checks", "_guarded", "_metas", "_odd", "loose")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._metas = self._read(tensors)
        self._odd = {i for i, t in enumerate(tensors) if not _is_plain(t)}
        self._guarded = all(type(t).__torch_dispatch__ is no_dispatch or type(t) is FakeTensor for t in tensors)
        self.loose = tuple(i for i, t in enumerate(tensors) if not t.requires_grad)
        self._checks: list[Check] = []

    @staticmethod
    def _read(tensors: Sequence[Tensor]) -> list[Any]:
        return [_meta(t) for t in tensors]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Do these tensors lie in the same way?"""
        if len(tensors) != len(self._metas):
            return False
        for check in self._checks:
            if check(*tensors):
                return True
        if self._read(tensors) != self._metas:
            return False
        if self._guarded and len(self._checks) < _MOST_CHECKS:
            self._checks.append(guard_of(*tensors))
        return True

    def fits_at(self, i: int, t: Tensor) -> bool:
        """Does this tensor lie as the i-th did?"""
        return bool(_meta(t)[:-1] == self._metas[i][:-1])

    def is_empty(self, i: int) -> bool:
        """Did the i-th have no elements, so that its memory does not matter?"""
        return 0 in self._metas[i][0]

    def read(self, i: int, memory: Any, offset: int) -> Tensor | None:
        """Return the i-th tensor's values from a storage that it had; None if they can't be read from it."""
        shape, stride, dtype, device = self._metas[i][:4]
        if i in self._odd or memory is None or memory.device != device or device.type == "meta":
            return None
        if memory.nbytes() < _end(shape, stride, offset) * dtype.itemsize:
            return None  # `set_` would let it grow
        return torch.empty(0, dtype=dtype, device=device).set_(memory, offset, shape, stride)


class Memory:
    """The memory of some tensors at one moment. It holds their storages, so that no new storage gets the address of one of them.

    Args:
        tensors: the tensors.
        layout: their layout at an earlier moment, if that is known.
    """

    __slots__ = ("layout", "offsets", "storages")

    def __init__(self, tensors: Sequence[Tensor], layout: Layout | None = None) -> None:
        self.storages, self.offsets = storages_of(tensors), _offsets(tensors)
        self.layout = layout if layout is not None and layout.fits(tensors) else Layout(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Do all of them have the same memory as then?"""
        return storages_of(tensors) == self.storages and _offsets(tensors) == self.offsets and self.layout.fits(tensors)

    def has_moved(self, i: int, t: Tensor) -> bool:
        """Does the i-th have another storage or layout now? A storage that FSDP frees and fills again stays the same."""
        if self.layout.is_empty(i):
            return False
        same = same_storage(storage(t), self.storages[i]) and _offsets([t])[0] == self.offsets[i]
        return not same or not self.layout.fits_at(i, t)

    def moved(self, tensors: Sequence[Tensor]) -> list[int]:
        """Return the indices of the tensors that have moved, and of those that had no elements and have some now."""
        if self.holds(tensors):
            return []
        return [i for i, t in enumerate(tensors) if self.has_moved(i, t) or (self.layout.is_empty(i) and t.numel())]

    def read(self, i: int) -> Tensor | None:
        """Return the values in the memory that the i-th had; None if they can't be read."""
        return self.layout.read(i, self.storages[i], self.offsets[i])

    def put_back(self, i: int, t: Tensor) -> None:
        """Give the i-th the memory that it had. If that is impossible, give it memory full of NaN, so that no kernel reads address 0."""
        data = self.read(i)
        if data is None and type(t) in OWN and t.layout == torch.strided and not t.is_meta:
            data = torch.empty(t.shape, dtype=t.dtype, device=t.device)
            data = data.fill_(float("nan")) if t.dtype.is_floating_point or t.dtype.is_complex else data.zero_()
        if data is not None and fits_in(t, data):
            t.data = data


def storages_of(tensors: Sequence[Tensor]) -> list[Any]:
    """Return the tensors' storages; None for one that has none."""
    try:
        return list(map(_untyped, tensors))
    except (NotImplementedError, RuntimeError):
        return [storage(t) for t in tensors]


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(_offset, tensors))
    except (NotImplementedError, RuntimeError):
        return [0 if storage(t) is None else int(t.storage_offset()) for t in tensors]


def lost(t: Tensor) -> bool:
    """Does a tensor have a placeholder's memory, with a size but no address? A kernel that reads it crashes the process.

    FSDP frees storages too, but resizes them to 0 bytes.
    """
    return t.data_ptr() == 0 and t.numel() > 0 and t.untyped_storage().nbytes() > 0 and not t.is_meta


def fits_in(t: Tensor, data: Tensor) -> bool:
    """Does torch allow `t.data = data`?"""
    return bool(_fits_in(t, data))


class Back:
    """Tensors in dicts, and memory of tensors, that somebody replaced after the forward and that are put back for the replay.

    Attributes:
        dicts: dicts of parameters, buffers and modules, each with its old content.
        memory: tensors, each with a tensor that has its old memory.
    """

    __slots__ = ("dicts", "memory")

    def __init__(self) -> None:
        self.dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.memory: list[tuple[Tensor, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self.dicts or self.memory)

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Put everything back inside the context; afterwards everything is as just before it."""
        contents = [(d, dict(d)) for d, _ in self.dicts]
        data = [t.data for t, _ in self.memory]
        try:
            for d, content in self.dicts:
                fill(d, content)
            for t, memory in self.memory:
                t.data = memory
            yield
        finally:
            for (t, _), now in zip(self.memory, data, strict=True):
                t.data = now
            for d, content in contents:
                fill(d, content)


def fill(d: dict[str, Any], content: dict[str, Any]) -> None:
    """Make a dict hold exactly `content`, in that order."""
    d.clear()
    d.update(content)
