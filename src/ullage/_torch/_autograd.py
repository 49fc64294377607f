"""Names of autograd's: saved-tensor hooks, the engine, nodes, versions."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint as torchs
from torch.autograd import forward_ad

from ullage._torch._find import attribute, find

_CHECKPOINT, _PLANS = "ullage.checkpoint, or a plan that is applied,", "a plan or a profile"

VERSION = attribute("torch.Tensor._version", "how often a tensor was written to in place", _CHECKPOINT)
STORAGE = attribute("torch.UntypedStorage._cdata", "which memory a tensor has", _CHECKPOINT)
_BASE = attribute("torch.Tensor._base", "what a view is a view of", _PLANS)
_NODE = attribute("torch.autograd.graph.Node._sequence_nr", "which forward op made a node", _PLANS)

push_hooks = find(
    "torch._C._autograd._push_saved_tensors_default_hooks",
    "saved-tensor hooks without a context manager's microseconds",
    _CHECKPOINT,
    beside=(VERSION, STORAGE),
)
pop_hooks = find("torch._C._autograd._pop_saved_tensors_default_hooks", "ends `_push_...`", _CHECKPOINT)
top_hooks = find(
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "are somebody else's saved-tensor hooks on?",
    _CHECKPOINT,
    stand_in=lambda ignore_is_tracing: ((), ()),
    instead="units hold their arguments as if others' saved-tensor hooks were on, so none leaves its input to the unit before it",
    said=True,
)
make_saved_tensor = find(
    "torch._C._autograd._make_saved_tensor",
    "hands one tensor to the saved-tensor hooks around a unit",
    _CHECKPOINT,
    stand_in=None,
    instead="a small `autograd.Function` saves it",
    since="2.12",
)
set_versions = find(
    "torch._C._autograd._unsafe_set_version_counter",
    "a write that is taken back is not counted",
    "putting back what a unit's forward writes, or offload,",
)
sequence_number = find(
    "torch._C._autograd._get_sequence_nr",
    "the number of autograd's next node",
    f"{_PLANS}, or offload,",
    beside=(_NODE,),
)
keeps_graph = find(
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "does this backward keep its graph?",
    _PLANS,
    stand_in=lambda: False,
    instead="Python numbers that nodes save are predicted to be freed in a backward with `retain_graph=True`, too: a few bytes each",
    said=True,
)
graph_task = find("torch._C._current_graph_task_id", "which backward runs", _CHECKPOINT)
graph_group = find(
    "torch._C._get_graph_exec_group",
    "which `torch.utils.checkpoint.GraphExecGroup` is on",
    _CHECKPOINT,
    stand_in=lambda: None,
    instead="a second backward in one `GraphExecGroup` replays anew, where torch refuses it",
)
autograd_node = find("torch._C._current_autograd_node", "the node whose backward runs", _PLANS, beside=(_NODE, _BASE))
at_end_of_backward = find(
    "torch.autograd.Variable._execution_engine.queue_callback", "frees the tensors that a replay rebuilt", _CHECKPOINT
)
set_grad_enabled = find(
    "torch._C._set_grad_enabled",
    "grad mode on in a replay",
    _CHECKPOINT,
    stand_in=torch.set_grad_enabled,
    instead="`torch.set_grad_enabled`, which is slower",
)
node_classes = find("torch._C._functions", "what each kind of node saves", "learning what a unit saves")
all_schemas = find(
    "torch._C._jit_get_all_schemas", "which ops write to what their node has saved", "learning what a unit saves"
)


def _in_forward_mode() -> bool:
    return bool(forward_ad._current_level >= 0)


in_forward_mode = find(
    "torch.autograd.forward_ad._current_level", "does forward-mode autograd run?", _CHECKPOINT, through=_in_forward_mode
)


def _debug_setting() -> Any:
    return torchs._checkpoint_debug_enabled


def _early_stop_setting() -> Any:
    return torchs._enable_checkpoint_early_stop


checkpoint_debug = find(
    "torch.utils.checkpoint._checkpoint_debug_enabled",
    "what `set_checkpoint_debug_enabled` has set",
    "ullage.checkpoint",
    through=_debug_setting,
    stand_in=lambda: None,
    instead="`torch.utils.checkpoint.set_checkpoint_debug_enabled` says nothing to ullage; use debug=",
    said=True,
)
checkpoint_early_stop = find(
    "torch.utils.checkpoint._enable_checkpoint_early_stop",
    "what `set_checkpoint_early_stop` has set",
    "ullage.checkpoint",
    through=_early_stop_setting,
    stand_in=lambda: None,
    instead="`torch.utils.checkpoint.set_checkpoint_early_stop` says nothing to ullage; use early_stop=",
    said=True,
)
