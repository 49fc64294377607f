"""C++ asks tensors for their device, sizes and strides where nothing may be raised: no dispatch mode of ours does."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ullage as ul
from ullage.runtime.ops._debug import OpNames
from ullage.runtime.ops._log import Recorder, is_query
from ullage.runtime.ops._select import Selection
from ullage.runtime.ops._watch import Changed, Watch, storage_of
from ullage.runtime.replay._skip import SkipMode, Stale

aten = torch.ops.aten
QUERIES = [
    torch.ops.prim.device.default, aten.sym_size.default, aten.sym_stride.default, aten.sym_numel.default, aten.is_contiguous.default,
    aten.sym_storage_offset.default, aten.dim.default, aten.is_non_overlapping_and_dense.default, aten.is_strides_like_format.default,
]  # fmt: skip


def _modes(x: Tensor) -> dict[str, Any]:
    """Each mode as far on as it can be: `x` has changed, the log is at its end."""
    nothing = Selection(frozenset(), frozenset(), (), 0)
    return {
        "watch": Watch({storage_of(x): "x"}),
        "skip": SkipMode(nothing, {}),
        "record": Recorder(),
        "names": OpNames([]),
    }


@pytest.mark.parametrize("func", QUERIES, ids=str)
@pytest.mark.parametrize("name", ["watch", "skip", "record", "names"])
def test_a_question_about_metadata_passes(func: Any, name: str) -> None:
    x, asked = torch.ones(2), []
    mode = _modes(x)[name]
    assert is_query(func)

    class Question:
        """Stands for the op, and says whether it was passed on."""

        namespace = func.namespace
        _schema = func._schema
        tags = func.tags

        def __call__(self, *args: Any) -> str:
            asked.append(args)
            return "answer"

        def __hash__(self) -> int:
            return hash(func)

        def __eq__(self, other: object) -> bool:
            return other is func

    assert mode.__torch_dispatch__(Question(), (), (x,)) == "answer"
    assert len(asked) == 1 and asked[0][0] is x


def test_what_is_no_question_is_still_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(Changed), Watch({storage_of(x): "x"}):
        x.sum().item()
    with pytest.raises(Stale), SkipMode(Selection(frozenset(), frozenset(), (), 0), {}):
        x.sum()


def test_a_fake_tensor_s_device_is_asked_for_under_a_watch() -> None:
    with FakeTensorMode():
        x = torch.ones(2, requires_grad=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(Watch({storage_of(x): "x"}))
            y = (x + 1).exp()  # each makes a node, whose metadata C++ reads from the fake tensor
        assert y.requires_grad and y.grad_fn is not None


class _Block(nn.Module):
    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(0)))
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5) if self.dropout else self.norm(x + self.shift)
        out: Tensor = self.linear(F.gelu(x))
        return out


@pytest.mark.parametrize("keep", [None, "matmul_attention", {aten.native_layer_norm.default, aten.gelu.default}])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("written", ["iadd", "mul_", "view"])
def test_a_residual_written_after_the_unit_gives_the_plain_gradients_or_an_error(
    written: str, dropout: bool, keep: Any
) -> None:
    torch.manual_seed(0)
    block, entry = _Block(dropout), nn.Linear(8, 8)
    given = torch.randn(4, 8)

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(1)
        for m in (block, entry):
            m.zero_grad()
        x = entry(given)
        h = ul.checkpoint(block, x, keep=keep) if checkpointed else block(x)
        if written == "iadd":
            x += h
        elif written == "mul_":
            x.mul_(0.5)
        else:
            x[:, :4] = 0.0
        (x + h).square().mean().backward()
        return [p.grad.clone() for m in (block, entry) for p in m.parameters() if p.grad is not None]

    plain = gradients(False)
    for _ in range(3):
        try:
            found = gradients(True)
        except ul.ReplayError as error:
            assert "argument 0 was changed between forward and backward" in str(error)
        else:
            assert len(found) == len(plain) and all(map(torch.equal, found, plain))


def test_the_process_does_not_end(tmp_path: Any) -> None:
    """The shape of the report: a residual stream that is added to in place, in a captured step."""
    script = tmp_path / "step.py"
    script.write_text(
        "import torch, ullage as ul\n"
        "from torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(s):\n"
        "        super().__init__(); s.p = nn.Parameter(torch.zeros(8)); s.n = nn.LayerNorm(8); s.a = nn.Linear(8, 8)\n"
        "    def forward(s, x): return s.a(s.n(x + s.p))\n"
        "class Net(nn.Module):\n"
        "    def __init__(s): super().__init__(); s.i = nn.Linear(8, 8); s.b = nn.ModuleList(Block() for _ in range(3))\n"
        "    def forward(s, x):\n"
        "        x = s.i(x)\n"
        "        for b in s.b: x += b(x)\n"
        "        return x.square().mean()\n"
        "plan = ul.plan(ul.Workload(Net(), torch.randn(4, 8)), policy='every_block', costs='roofline')\n"
        "print([d.action for d in plan.decisions])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip() == "['keep', 'keep', 'keep', 'keep']"
