"""Make the outputs of an op on fake tensors from an earlier call with the same signature, without the fake kernel.

A fake kernel is a function of its arguments' metadata, so its outputs for a known signature are known: fresh tensors of these
shapes, a view of its first argument, or its first argument itself. Without this, two thirds of a capture's time go to fake kernels
(torch's own cache of them spends its time on making keys).

Only calls with plain strided tensors, of ops whose outputs can depend on nothing else, are remembered. All others run the fake
kernel every time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ullage._torch import (
    DisableTorchDispatch,
    FakeTensor,
    FakeTensorMode,
    make_subclass,
    throw_on_data_ptr,
    warn_on_data_ptr,
)
from ullage.capture._op_values import MANY
from ullage.capture._values import may_follow

aten = torch.ops.aten
_NEVER_TAGS = (
    torch.Tag.dynamic_output_shape,
    torch.Tag.data_dependent_output,
    torch.Tag.inplace_view,
)
# Ops that make or change more of a fake tensor than its metadata (constants, storages).
_NEVER = {aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.set_.source_Storage, aten.resize_.default}
# Ops that return a view although their schema declares none: autograd is not to know.
_VIEWS = {aten._unsafe_view.default}
_PLAIN_TYPES = (str, type(None))
_ATOMS = frozenset({int, float, bool, complex, torch.dtype, torch.device, torch.layout, torch.memory_format})
_META = torch.device("meta")


def argument_key(value: Any) -> Any:
    """Return a hashable description of an op argument, in which 1, 1.0 and True differ."""
    kind = type(value)
    if kind is FakeTensor:  # the quick way for four of five arguments: this runs millions of times
        if value.layout is torch.strided and value.constant is None and not (value.is_neg() or value.is_conj()):
            return (value.shape, value.stride(), value.dtype, value.fake_device)
    elif kind in _ATOMS:
        return (kind, value)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return (value.shape, (), value.dtype, value.device)
        if not isinstance(value, FakeTensor):
            return (value.shape, value.stride(), value.dtype, value.device)
        if value.constant is not None or value.is_neg() or value.is_conj():
            return (value.shape, value.stride(), value.dtype, value.fake_device, value.is_neg(), value.is_conj())
        return (value.shape, value.stride(), value.dtype, value.fake_device)
    if isinstance(value, MANY):
        return tuple([argument_key(v) for v in value])
    if isinstance(value, _PLAIN_TYPES):
        return value
    if isinstance(value, torch.Generator):
        return None
    return (value.__class__, value)


@dataclass(frozen=True)
class _Entry:
    """A recipe for an op's outputs.

    Attributes:
        kind: new, view (of the first argument), first (itself) or nothing.
        specs: per output its shape, strides, dtype, device and offset.
        container: type of the list or tuple of outputs; None for a single output.
        valued: may the call make or change values that are carried along? See `may_follow`.
        fresh: may the outputs have storages that were not seen before?
    """

    kind: str
    specs: tuple[Any, ...] = ()
    container: type | None = None
    valued: bool = True
    fresh: bool = False


@dataclass(slots=True, eq=False)
class KnownCall:
    """The recipes for calls with one signature. This object stands for the signature, whose hash costs as much as a fake kernel's output.

    Attributes:
        func: the op; held, because keys have its id.
        view: see `_is_view`.
        entries: recipes for the outputs, by the first argument's offset for a view; None where none can be made.
    """

    func: Any
    view: bool | None
    entries: dict[int, _Entry | None] = field(default_factory=dict)


class KnownOutputs:
    """Remembers, per signature, how to make an op's outputs. It shares its memory with `like`, both ways."""

    def __init__(self, mode: FakeTensorMode, like: KnownOutputs | None = None) -> None:
        self.mode = mode
        self._calls: dict[Any, KnownCall] = {} if like is None else like._calls
        self._states: dict[torch.device, dict[str, Any]] = {}  # attributes of a new fake tensor, by device
        unsafe = getattr(mode, "_allow_unsafe_data_ptr_access", None)
        self._guard = None if unsafe is None else warn_on_data_ptr if unsafe else throw_on_data_ptr

    def call(self, func: Any, args: Any, kwargs: Any) -> KnownCall:
        """Return the recipes for calls with this signature."""
        # the op by its id, because its own hash runs Python
        key = (id(func), argument_key(args), tuple([(k, argument_key(v)) for k, v in kwargs.items()]))
        known = self._calls.get(key)
        if known is None:
            known = self._calls[key] = KnownCall(func, _is_view(func))
        return known

    @staticmethod
    def offset(known: KnownCall, args: Any) -> int | None:
        """Return the key of a call's recipe among those of its signature, or None if the op is never remembered."""
        if known.view is None or not args:
            return None
        if not known.view:
            return 0
        first = args[0]
        return int(first.storage_offset()) if isinstance(first, FakeTensor) else None

    def make(self, entry: _Entry, args: Any) -> Any:
        """Return a call's outputs."""
        if entry.kind == "first" or entry.kind == "nothing":
            return args[0] if entry.kind == "first" else None
        elements = []
        with DisableTorchDispatch():  # below every mode: these are plain meta tensors
            if entry.kind == "view":
                storage = args[0].untyped_storage()
                for shape, stride, dtype, _, offset in entry.specs:
                    meta = torch.empty_strided((0,), (1,), dtype=dtype, device=_META)
                    elements.append(meta.set_(storage, offset, shape, stride))
            else:
                for shape, stride, dtype, _, _ in entry.specs:
                    elements.append(torch.empty_strided(shape, stride, dtype=dtype, device=_META))
        if entry.container is None:
            return self._fake(elements[0], entry.specs[0][3])
        return entry.container([self._fake(e, s[3]) for e, s in zip(elements, entry.specs, strict=True)])

    def _fake(self, meta: Tensor, device: torch.device) -> FakeTensor:
        """Make `FakeTensor(mode, meta, device)` without its checks of the arguments."""
        state = self._states.get(device)
        if state is None or make_subclass is None or self._guard is None:
            first = FakeTensor(self.mode, meta, device)
            self._states[device] = dict(vars(first))
            return first
        made: FakeTensor = make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
        self._guard(made)
        vars(made).update(state)
        return made

    def learn(self, known: KnownCall, offset: int, args: Any, kwargs: Any, out: Any) -> None:
        """Remember the fake kernel's outputs, if equal ones can be made without it."""
        if offset not in known.entries:
            known.entries[offset] = self._entry(known, args, kwargs, out)

    def _entry(self, known: KnownCall, args: Any, kwargs: Any, out: Any) -> _Entry | None:
        func, view = known.func, bool(known.view)
        if any(_special(a) for a in (*_flat(args), *_flat(tuple(kwargs.values())))):
            return None
        if func._schema.is_mutable:
            if out is None:
                return _Entry("nothing")
            return _Entry("first") if out is args[0] and isinstance(out, FakeTensor) else None
        container = None if isinstance(out, Tensor) else type(out)
        outs = [out] if container is None else list(out) if container in (list, tuple) else []
        if not outs or not all(type(o) is FakeTensor and not _special(o) for o in outs):
            return None
        given = {a.untyped_storage()._cdata for a in _flat((args, tuple(kwargs.values()))) if isinstance(a, Tensor)}
        seen: set[int] = set()
        for o in outs:
            storage = o.untyped_storage()
            if view and storage._cdata != args[0].untyped_storage()._cdata:
                return None
            if not view and (storage._cdata in given | seen or not _whole(o)):
                return None
            seen.add(storage._cdata)
        specs = tuple((tuple(o.shape), o.stride(), o.dtype, o.fake_device, o.storage_offset()) for o in outs)
        return _Entry("view" if view else "new", specs, container, may_follow(func, outs), fresh=not func.is_view)


def _is_view(func: Any) -> bool | None:
    """True for a view op, False for one that is not, None for one that is never remembered."""
    if func in _NEVER or any(tag in func.tags for tag in _NEVER_TAGS) or func.namespace not in ("aten", "prims"):
        return None
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    if func._schema.is_mutable:  # remembered only if it writes to its first argument, and returns that or nothing
        first = func._schema.arguments[0].alias_info
        return False if first is not None and first.is_write and len(func._schema.returns) <= 1 else None
    return bool(aliases) or func in _VIEWS


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for v in values:
        found += _flat(v) if isinstance(v, list | tuple) else [v]
    return found


def _special(value: Any) -> bool:
    """Is it a tensor (or symbol) whose metadata doesn't say everything?"""
    if not isinstance(value, Tensor):
        return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
    if not isinstance(value, FakeTensor) or value.layout is not torch.strided:
        return True
    return value.constant is not None or value.is_conj() or value.is_neg()


def _whole(tensor: FakeTensor) -> bool:
    """Does a tensor fill its storage, as one made by `empty_strided` does?"""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    return tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == span * tensor.dtype.itemsize
