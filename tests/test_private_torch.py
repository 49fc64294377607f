"""What torch does not promise: all of it is named in `ullage._torch`, and each name's absence is told where it is used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ullage as ul
from tests import vanishing
from ullage import _torch

ROOT = Path(__file__).parents[1]
ALL = vanishing.FEATURES
REPLAYS = ("checkpoint", "keep", "plan", "apply", "verify")
# Per name that has no stand-in, what raises UnsupportedTorch for it; all else works. What is a special feature runs for its names only.
BREAKS: dict[str, tuple[str, ...]] = {
    "torch.utils._pytree.tree_flatten": ALL,
    **dict.fromkeys(
        (
            "torch.Tensor._version",
            "torch.UntypedStorage._cdata",
            "torch._C._autograd._push_saved_tensors_default_hooks",
            "torch._C._autograd._pop_saved_tensors_default_hooks",
        ),
        (*REPLAYS, "offload"),
    ),
    **dict.fromkeys(
        (
            "torch.autograd.graph.Node._sequence_nr",
            "torch._C._autograd._get_sequence_nr",
            "torch._C._current_graph_task_id",
            "torch.autograd.Variable._execution_engine.queue_callback",
            "torch._C._functions",
            "torch._C._jit_get_all_schemas",
            "torch.autograd.forward_ad._current_level",
            "torch._C._len_torch_function_stack",
            "torch._C._functorch.peek_interpreter_stack",
            "torch._C._functorch.is_functorch_wrapped_tensor",
        ),
        REPLAYS,
    ),
    "torch.Tensor._is_zerotensor": ("checkpoint", "keep", "apply", "verify"),
    "torch.ops.aten.mul.Tensor._schema": ("keep", "plan"),
    "torch.utils._python_dispatch.TorchDispatchMode": ("keep", "plan"),
    "torch._C._len_torch_dispatch_stack": ("keep",),
    "torch.multiprocessing.reductions.StorageWeakRef": ("keep",),
    **dict.fromkeys(
        (
            "torch.Tensor._base",
            "torch._C._current_autograd_node",
            "torch.ops.aten.mul.Tensor._overloadpacket",
            "torch.ops.aten.mul.Tensor._overloadname",
            "torch._C._DisableTorchDispatch",
            "torch.optim.optimizer._foreach_supported_types",
            "torch.utils.flop_counter.flop_registry",
            "torch._subclasses.fake_tensor.FakeTensor",
            "torch._subclasses.fake_tensor.FakeCopyMode",
            "torch._subclasses.fake_tensor.FakeTensorMode",
            "torch.utils.weak.WeakTensorKeyDictionary",
            "torch.Tensor._use_count",
            "torch._C._storage_Use_Count",
            "torch._prims_common.is_non_overlapping_and_dense_or_false",
        ),
        ("plan",),
    ),
    "torch._C._autograd._ProfilerResult.experimental_event_tree": ("measure",),
    "torch.utils.weak.TensorWeakRef": ("verify", "measure"),
    **dict.fromkeys(
        (
            "torch.nn.Module._compiled_call_impl",
            "torch._C._dynamo.eval_frame._FrameExecStrategy",
            "torch._C._dynamo.eval_frame._FrameAction",
            "torch._C._dynamo.eval_frame.set_code_exec_strategy",
        ),
        ("compiled unit",),
    ),
    "torch.overrides._get_current_function_mode_stack": ("device context",),
    "torch.utils._device.DeviceContext": ("device context",),
    "torch._C.DisableTorchFunctionSubclass": ("digests of a subclass",),
    **dict.fromkeys(
        [n for n in _torch.PRIVATE if n.startswith("torch._VF.")],
        ("recurrent layers",),
    ),
    "torch._C._dispatch_tls_is_dispatch_key_excluded": ("sparse product",),
    "torch._C._dispatch_tls_set_dispatch_key_excluded": ("sparse product",),
    "torch._C.DispatchKey": ("sparse product",),
    "torch._C._autograd._unsafe_set_version_counter": ("written buffer",),
    "torch.optim.optimizer._get_foreach_kernels_supported_devices": ("estimate",),
}
# Used where no test here goes: a GPU, complex numbers, torch.func, a Monitor, what others replace between forward and backward.
ELSEWHERE = {
    "torch.cuda.memory._snapshot", "torch.cuda.memory._record_memory_history", "torch._C._set_conj", "torch._C._set_neg", "torch._neg_view",
    "torch._C._functorch.get_unwrapped", "torch._has_compatible_shallow_copy_type", "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map", "torch.utils._pytree.tree_unflatten", "torch._VF",
    "torch.utils._python_dispatch._disable_current_modes",  # ops that are not aten's, of real values within a capture
    # a selective replay without it is a full one, which a warning says
    "torch.Tensor._make_wrapper_subclass",
}  # fmt: skip
SAID = {n for n, p in _torch.PRIVATE.items() if p.said}
SETTINGS = [n for n, p in _torch.PRIVATE.items() if p.feature == "a replay under the settings of its forward"]
FEW = [
    "torch._C._autograd._push_saved_tensors_default_hooks",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._current_graph_task_id",
    "torch._C._dynamo.eval_frame._FrameAction",
    "torch._C._dynamo.guards.TensorGuards",
    "torch._C._get_cudnn_enabled",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch.utils._device.DeviceContext",
    "torch.utils._pytree.tree_flatten",
]


def _tried(name: str) -> tuple[str, ...]:
    if name in SETTINGS:
        return ("checkpoint",)
    broken = BREAKS.get(name, ())
    return broken if broken and not set(broken) & set(ALL) else ALL


def _vanish(names: list[str], at: Path) -> dict[str, Any]:
    work = vanishing.make_work(vanishing.make_model())
    plans = [at / "plan.json", at / "disk.json"]
    ul.plan(work, policy="every_block", costs="roofline").save(plans[0])
    ul.plan(work, policy="offload", costs="roofline", disk_directory=at, disk_budget="16MiB").save(plans[1])
    lines = [f"{name}={','.join(_tried(name))}" for name in names]
    command = [sys.executable, str(Path(vanishing.__file__)), *map(str, plans), *lines]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def _check(names: list[str], at: Path) -> None:
    for name, found in _vanish(names, at).items():
        assert found["import"] == "", name
        gone = found["broken"]
        assert tuple(gone) == BREAKS.get(name, ()) and set(gone.values()) <= {name}, (name, gone)
        entry = _torch.PRIVATE[name]
        assert found["notes"] == ([f"{entry}: {entry.instead}"] if name in SAID else []), name
        assert found["told"] == int(name in SAID) or name in ELSEWHERE, name


def test_what_a_name_that_is_gone_breaks(tmp_path: Path) -> None:
    _check(FEW, tmp_path)


@pytest.mark.slow
def test_what_each_name_that_is_gone_breaks(tmp_path: Path) -> None:
    """One unlike another each, so none stands for others; a second each, in a process of its own."""
    _check([n for n, p in _torch.PRIVATE.items() if p.found and n not in FEW], tmp_path)


def test_each_name_has_a_stand_in_or_breaks_something() -> None:
    without = {n for n, p in _torch.PRIVATE.items() if not p.instead}
    assert without == set(BREAKS) | ELSEWHERE and not set(BREAKS) & ELSEWHERE


def test_all_names_are_here() -> None:
    """In every torch that is allowed; what a newer one lacks must be looked for under its new name."""
    assert [n for n, p in _torch.PRIVATE.items() if not p.found and _torch.at_least(p.since)] == []


# But for ops. `torch._...`, a private module or a private part of one that is imported under a name, but `torch.__version__` and the like
NAMED = re.compile(
    r"""\btorch(?!\.ops)(\.\w+)*\._(?!_)|\bfrom\ torch\._|\b(torchs|optim|forward_ad|overrides|fake_tensor|profiler)\._(?!_)"""
    r"""|from\ torch[\w.]*\ import\ .*\b_(?!_)|getattr\(torch\._C|import\ torch\._""",
    re.VERBOSE,
)


def test_nothing_else_names_private_parts() -> None:
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        if "_torch" in file.parts or file.parent.name == "_torch":
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            code = re.sub(r"`[^`]*`", "", line.partition("  # ")[0])
            if NAMED.search(code):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "x = torch._C._foo()",
        "from torch._ops import OpOverload",
        "from torch.utils._pytree import tree_map",
        "from torch.overrides import _stack",
        "import torch._dynamo",
        "torchs._checkpoint_debug_enabled",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert NAMED.search(line)
    assert not NAMED.search("torch.__version__, torch.utils.checkpoint.noop_context_fn, x._version")


def test_the_page_lists_them() -> None:
    page = (ROOT / "docs" / "private-torch.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("| `torch.")]
    assert rows == _torch.table()
