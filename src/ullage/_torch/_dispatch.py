"""Names of the dispatcher's: modes, ops, subclasses of `Tensor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.utils.data

from ullage._torch._find import attribute, find, find_class

_CHECKPOINT, _PLANS = "ullage.checkpoint, or a plan that is applied,", "a plan or a profile"
_SELECTIVE = "a selective replay (keep=), a plan or a profile"
_MODES = "torch.utils._python_dispatch"

_SCHEMA = attribute("torch.ops.aten.mul.Tensor._schema", "which arguments an op writes to", _SELECTIVE)
_PACKET = attribute("torch.ops.aten.mul.Tensor._overloadpacket", "the op of an overload", _PLANS)
_NAME = attribute("torch.ops.aten.mul.Tensor._overloadname", "an op's name in a plan", _SELECTIVE)

# their classes, found on an op: no name is needed
OpOverload: Any = type(torch.ops.aten.mul.Tensor)
OpOverloadPacket: Any = type(torch.ops.aten.mul)

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_unflatten as tree_unflatten
else:
    TorchDispatchMode = find_class(
        f"{_MODES}.TorchDispatchMode",
        "sees each op",
        f"{_SELECTIVE}, debug=True or a Monitor's FLOPs",
        beside=(_SCHEMA,),
    )
    tree_flatten = find("torch.utils._pytree.tree_flatten", "the tensors in nested values", _CHECKPOINT)
    tree_leaves = find("torch.utils._pytree.tree_leaves", "the tensors in nested values", "a Monitor's FLOPs")
    tree_map = find("torch.utils._pytree.tree_map", "the same nested values of other tensors", _SELECTIVE)
    tree_unflatten = find("torch.utils._pytree.tree_unflatten", "an op's result from its parts", _SELECTIVE)

disable_modes = find(f"{_MODES}._disable_current_modes", "runs an op on real tensors within a capture", _PLANS)
count_modes = find("torch._C._len_torch_dispatch_stack", "is a dispatch mode on?", _CHECKPOINT)
count_function_modes = find("torch._C._len_torch_function_stack", "is a function mode on?", _CHECKPOINT)
function_modes = find(
    "torch.overrides._get_current_function_mode_stack",
    "where factories make tensors",
    "a `torch.device` context around a unit",
)
DeviceContext = find_class(
    "torch.utils._device.DeviceContext",
    "where factories make tensors",
    "a `torch.device` context around a unit",
    asked=True,
)
DisableTorchDispatch = find(
    "torch._C._DisableTorchDispatch", "makes tensors below every mode", _PLANS, beside=(_PACKET, _NAME)
)
DisableTorchFunctionSubclass = find(
    "torch._C.DisableTorchFunctionSubclass", "the values of a tensor of a subclass", 'determinism_check="values"'
)
no_dispatch = find(
    "torch._C._disabled_torch_dispatch_impl",
    "has a class of tensors a `__torch_dispatch__` of its own?",
    _CHECKPOINT,
    stand_in=torch.Tensor.__torch_dispatch__,
    instead="the one that `torch.Tensor` has, which is it",
)
peek_interpreter = find(
    "torch._C._functorch.peek_interpreter_stack", "does a transform of torch.func run?", _CHECKPOINT
)
is_wrapped = find("torch._C._functorch.is_functorch_wrapped_tensor", "is a tensor one of torch.func's?", _CHECKPOINT)
unwrapped = find("torch._C._functorch.get_unwrapped", "what it stands for", "a plan of a step with torch.func")
is_excluded = find(
    "torch._C._dispatch_tls_is_dispatch_key_excluded",
    "is autocast on, in a function mode?",
    "a sparse product under autocast",
)
exclude = find(
    "torch._C._dispatch_tls_set_dispatch_key_excluded",
    "autocast on where a mode turned it off",
    "a sparse product under autocast",
)
DispatchKey = find("torch._C.DispatchKey", "the keys of autocast", "a sparse product under autocast")
make_wrapper_subclass = find(
    "torch.Tensor._make_wrapper_subclass",
    "stands for what a replay skips: a shape without memory",
    "a selective replay (keep=)",
)
_ENTERED = "a walk of a unit's state enters them: it takes longer, or stops at its limit, and the unit is kept"
OperatorBase = find(
    "torch._ops.OperatorBase",
    "ops' tables, no unit's state",
    "ullage.checkpoint",
    stand_in=OpOverload,
    instead=_ENTERED,
)
FunctionSchema = find(
    "torch._C.FunctionSchema", "schemas, no unit's state", "ullage.checkpoint", stand_in=OpOverload, instead=_ENTERED
)
LoaderIterator = find(
    "torch.utils.data.dataloader._BaseDataLoaderIter",
    "data loaders at work, no unit's state",
    "ullage.checkpoint",
    stand_in=torch.utils.data.DataLoader,
    instead=_ENTERED,
    said=True,
)
_EAGER = "torch._C._dynamo.eval_frame"
_COMPILED, _OFF = "a unit that torch.compile compiles", "keeps Dynamo off the runtime's own hooks"
_IS_COMPILED = attribute("torch.nn.Module._compiled_call_impl", "is a module compiled?", _COMPILED)
frame_strategy = find(f"{_EAGER}._FrameExecStrategy", _OFF, _COMPILED)
frame_action = find(f"{_EAGER}._FrameAction", _OFF, _COMPILED)
set_frame_strategy = find(f"{_EAGER}.set_code_exec_strategy", _OFF, _COMPILED, beside=(_IS_COMPILED,))
