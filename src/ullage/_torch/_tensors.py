"""Names of tensors', of fake tensors' and of what lies beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullage._torch._find import attribute, find, find_class, find_error

_CHECKPOINT, _PLANS = "ullage.checkpoint, or a plan that is applied,", "a plan or a profile"
_FAKE = "torch._subclasses.fake_tensor"

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
    from torch._subclasses.fake_tensor import FakeCopyMode as FakeCopyMode
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
    from torch.utils.weak import TensorWeakRef as TensorWeakRef
    from torch.utils.weak import WeakTensorKeyDictionary as WeakTensorKeyDictionary
else:
    FakeTensor = find_class(f"{_FAKE}.FakeTensor", "a tensor of a captured step", _PLANS)
    FakeCopyMode = find_class(f"{_FAKE}.FakeCopyMode", "copies a model onto fake tensors", _PLANS)
    FakeTensorMode = find_class(
        f"{_FAKE}.FakeTensorMode",
        "runs a step on shapes alone",
        _PLANS,
        beside=(f"{_FAKE}.FakeTensor", f"{_FAKE}.FakeCopyMode"),
    )
    _WORDS = "a step that needs values of tensors is told by the words of torch's own error"
    DataDependentOutputException = find_error(
        f"{_FAKE}.DataDependentOutputException", "a step reads a value", _PLANS, instead=_WORDS
    )
    DynamicOutputShapeException = find_error(
        f"{_FAKE}.DynamicOutputShapeException", "a shape depends on values", _PLANS, instead=_WORDS
    )
    StorageWeakRef = find_class(
        "torch.multiprocessing.reductions.StorageWeakRef",
        "is a storage still that one?",
        "a selective replay (keep=), a plan or a profile",
    )
    TensorWeakRef = find_class(
        "torch.utils.weak.TensorWeakRef", "a tensor that is looked at again later", "measure or verify"
    )
    WeakTensorKeyDictionary = find_class(
        "torch.utils.weak.WeakTensorKeyDictionary", "what is known of real tensors", _PLANS
    )

_COUNT = attribute("torch.Tensor._use_count", "who holds a gradient", _PLANS)
storage_users = find("torch._C._storage_Use_Count", "who holds a gradient's memory", _PLANS, beside=(_COUNT,))
is_dense = find(
    "torch._prims_common.is_non_overlapping_and_dense_or_false", "can a gradient be accumulated in place?", _PLANS
)
_CONSTRUCTOR = "`FakeTensor`'s own constructor, which is slower"
make_subclass = find(
    "torch.Tensor._make_subclass", "a fake tensor at once", _PLANS, stand_in=None, instead=_CONSTRUCTOR
)
throw_on_data_ptr = find(
    "torch._C._set_throw_on_mutable_data_ptr",
    "a fake tensor's memory is not to be read",
    _PLANS,
    stand_in=None,
    instead=_CONSTRUCTOR,
)
warn_on_data_ptr = find(
    "torch._C._set_warn_deprecated_on_mutable_data_ptr",
    "a fake tensor's memory is not to be read",
    _PLANS,
    stand_in=None,
    instead=_CONSTRUCTOR,
)
is_zero_tensor = find("torch.Tensor._is_zerotensor", "has a tensor memory?", _CHECKPOINT)
fits_in = find(
    "torch._has_compatible_shallow_copy_type", "can `t.data = other` be?", "putting back a tensor's memory for a replay"
)
set_conj = find("torch._C._set_conj", "a lazily conjugated view", "a unit that saves complex views")
set_neg = find("torch._C._set_neg", "a lazily negated view", "a unit that saves complex views")
negated_view = find("torch._neg_view", "an argument that is a lazily negated view", "timing an op on complex tensors")
TensorGuards = find(
    "torch._C._dynamo.guards.TensorGuards",
    "compares shapes, strides, dtypes and devices in one call",
    _CHECKPOINT,
    stand_in=None,
    instead="they are compared from Python, half a microsecond per tensor",
)
fix_weakref = find(
    "torch.UntypedStorage._fix_weakref",
    "a storage found by a weak reference is held again",
    "measure or verify",
    stand_in=lambda storage: None,
    instead="nothing, as versions without it need nothing",
)


def _is_lazy(t: Any) -> bool:
    return isinstance(t, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer)


is_lazy = find(
    "torch.nn.parameter.is_lazy",
    "has a parameter no shape yet?",
    _CHECKPOINT,
    stand_in=_is_lazy,
    instead="its two public classes",
)


def overlaps_itself(t: Tensor) -> bool:
    """Has a strided tensor elements that are one in memory, by an expanded dimension? What `torch._debug_has_internal_overlap` is sure of."""
    return any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True))
