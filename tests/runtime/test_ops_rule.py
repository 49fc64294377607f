"""Rules that name single calls of ops: their text, what they keep, as options of a plan, and under torch.compile."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import ullage
from tests.runtime.steps import aten, bits, gradients, inputs, ops_in, plain, unit
from ullage.mechanisms import Option, UnitSettings, option_from_name
from ullage.runtime import Site
from ullage.runtime.ops._keep import OpsRule, level_rule, named_rule, op_name

XW = ((4, 4), (4, 4))


def _f(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).sin().exp() @ w).cos()


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("mm[0]", {("mm", 0)}),
        ("gelu[0]+mm[0,1,3]", {("gelu", 0), ("mm", 0), ("mm", 1), ("mm", 3)}),
        ("max.dim[0,2-4,9]", {("max.dim", n) for n in (0, 2, 3, 4, 9)}),
        ("prims::sin[1]", {("prims::sin", 1)}),
        ("library::op.overload[0]+mm[0]", {("library::op.overload", 0), ("mm", 0)}),
    ],
)
def test_texts(text: str, calls: set[tuple[str, int]]) -> None:
    rule = OpsRule.from_text(text)
    assert rule.calls == calls and rule.text == text
    assert rule == OpsRule(frozenset(calls)) and hash(rule) == hash(OpsRule(frozenset(calls)))
    assert rule != OpsRule(frozenset(calls), routing=True)


def test_equal_calls_have_one_text() -> None:
    same = ("mm[3,0,1]+gelu[0]", "mm[0-1]+aten::gelu[0]+mm[3]", "gelu.default[0]+mm[0,1,3]")
    assert {OpsRule.from_text(t).text for t in same} == {"gelu[0]+mm[0,1,3]"}
    for seed in range(200):
        choose = random.Random(seed).randrange
        ops = ["mm", "gelu", "max.dim", "a::b"]
        rule = OpsRule(frozenset((ops[choose(4)], choose(12)) for _ in range(1 + choose(15))))
        assert OpsRule.from_text(rule.text) == rule
    assert OpsRule(frozenset()).text == ""


NONSENSE = {
    "mm": "expected an op and which of its calls",
    "mm[]": "expected an op",
    "mm[0]+": "expected an op",
    "mm[0] ": "expected an op",
    "mm[-1]": "expected an op",
    "mm[0;1]": "expected an op",
    "mm[3-2]": "3-2 is no range",
    "mmm[0]": "'mmm' in 'mmm[0]': torch has no such op",
    "mm.dim[0]": "torch has no such op",
    "prims::mm[0]": "torch has no such op",
    "": "expected an op",
}


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense(text: str) -> None:
    with pytest.raises(ValueError, match=NONSENSE[text].replace("[", r"\[")):
        OpsRule.from_text(text)
    with pytest.raises(ullage.ArgumentError, match=r"^keep"):
        ullage.checkpoint(_f, *inputs(*XW), keep=text)
    with pytest.raises(ValueError, match="^select:"):
        option_from_name(f"select:{text}")


def test_names_of_ops() -> None:
    assert op_name(aten.mm.default) == "mm"
    assert op_name(aten.max.dim) == "max.dim"
    assert op_name(torch.ops.prims.sin.default) == "prims::sin"


def _run(keep: Any, site: Site | None = None) -> tuple[dict[Any, int], Any]:
    """Ops of the second step, forward and backward, and its gradients."""
    x, w = inputs(*XW)
    wrap = unit(site or Site("unit"), None, rule=keep)
    seen: list[Any] = []
    for _ in range(2):
        ops = ops_in(lambda: seen.append(gradients(_f, [x, w], wrap)))
    return ops, seen[-1]


def test_each_op_is_counted_for_itself() -> None:
    """`mm[1]` is the second mm, where a level's matmuls are counted together, whatever the op."""

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(b, x @ w, w).sin().exp() @ w

    kept = {}
    for text in ("mm[0]", "mm[1]", "addmm[0]", "exp[0]", "sin[0]", "mm[0]+exp[0]"):
        site = Site("unit")
        args = inputs((4, 4), (4, 4), (4, 4))
        wrap = unit(site, None, rule=OpsRule.from_text(text))
        for _ in range(2):
            assert gradients(f, args, wrap) == gradients(f, args, plain)
        (known,) = site.shared.known.values()
        assert known.selection.refusal == ""
        kept[text] = len(known.selection.kept)
    # exp's output is saved twice, by exp and by the matmul after it; sin's is not saved: the nearest that is is exp's
    assert kept == {"mm[0]": 1, "mm[1]": 0, "addmm[0]": 1, "exp[0]": 2, "sin[0]": 2, "mm[0]+exp[0]": 3}


def test_only_the_named_call_is_not_done_again() -> None:
    truth = gradients(_f, inputs(*XW), plain)
    counts = {}
    for text in ("sin[0]", "mm[0]", "exp[0]", "exp[0]+mm[0]", "mm[1]", "exp[0]+mm[0-1]"):
        ops, seen = _run(OpsRule.from_text(text))
        assert seen == truth
        counts[text] = tuple(ops.get(op, 0) for op in (aten.sin.default, aten.exp.default))
    # sin and exp of forward, of the replay, and (sin of cos's backward) of backward
    assert counts == {
        "sin[0]": (2, 1), "mm[0]": (3, 2), "exp[0]": (2, 1), "exp[0]+mm[0]": (2, 1), "mm[1]": (3, 2), "exp[0]+mm[0-1]": (2, 1),
    }  # fmt: skip


def test_what_only_reads_a_storage_that_is_written_in_place_is_not_run_again() -> None:
    """relu_ writes what the first matmul made; rebuilding that takes both, and not the second matmul, which reads it."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w).relu_() @ w).sin()

    site, seen = Site("unit"), []
    wrap = unit(site, None, rule=OpsRule.from_text("mm[1]"))
    for _ in range(2):
        ops = ops_in(lambda: seen.append(gradients(f, inputs(*XW), wrap)))
    truth = gradients(f, inputs(*XW), plain)
    assert seen == [truth, truth]
    assert ops[aten.relu_.default] == 2 and ops[aten.mm.default] == 2 + 1 + 4  # forward, replay, backward


def test_routing_outputs_are_kept_in_addition() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).exp()
        values, where = h.topk(2, -1)
        return (h.gather(-1, where) * values).sin()

    skipped = {}
    for routing in (False, True):
        settings = UnitSettings(Option("select", "exp[0]"), keeps_routing=routing)
        options = settings.runtime_options
        assert options.rule == OpsRule(frozenset({("exp", 0)}), routing)
        site = Site("unit")
        wrap = unit(site, None, rule=options.rule)
        for _ in range(2):
            assert gradients(f, inputs(*XW), wrap) == gradients(f, inputs(*XW), plain)
        (known,) = site.shared.known.values()
        skipped[routing] = [s.func for s in known.selection.steps if s.action == 1 and s.func is aten.topk.default]
    assert skipped == {False: [], True: [aten.topk.default]}


def test_keep_takes_texts_and_rules() -> None:
    truth = gradients(_f, inputs(*XW), plain)
    for keep in ("exp[0]", OpsRule.from_text("exp[0]")):

        def step(keep: Any = keep) -> None:
            assert gradients(lambda x, w: ullage.checkpoint(_f, x, w, keep=keep), inputs(*XW), plain) == truth

        step()
        assert ops_in(step)[aten.exp.default] == 1


def test_options() -> None:
    option = option_from_name("select:gelu[0]+mm[0,2]")
    assert option == Option("select", "gelu[0]+mm[0,2]") and option.name == "select:gelu[0]+mm[0,2]"
    assert option_from_name("select:a::b[0]").level == "a::b[0]"
    assert UnitSettings(option).runtime_options.rule == OpsRule.from_text("gelu[0]+mm[0,2]")
    assert UnitSettings(Option("select", "attention")).runtime_options.rule is level_rule("attention", False)
    assert UnitSettings(Option("recompute")).runtime_options.rule is None
    assert named_rule("", True) is level_rule("", True)
    for name in ("select", "select:", "keep:mm[0]", "recompute:mm[0]", "drop", "mm[0]"):
        with pytest.raises(ValueError, match=f"^{name}".replace("[", r"\[")):
            option_from_name(name)


needs_dynamo = pytest.mark.skipif(
    not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not run on this Python"
)


@needs_dynamo
@pytest.mark.parametrize(
    ("keep", "sins"), [("mm[0]", 2), ("sin[0]", 1), ("sin[1]", 1), (OpsRule.from_text("mm[0]+sin[0]"), 1)]
)
def test_under_compile_all_calls_of_the_named_ops_are_kept(keep: Any, sins: int) -> None:
    if isinstance(keep, OpsRule) and not hasattr(torch._C._autograd, "_make_saved_tensor"):
        pytest.skip("Dynamo of torch 2.11 does not rebuild a frozen dataclass; plans give texts")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    counts: list[int] = []

    def count(graph: Any, example: Any) -> Any:
        counts.append(sum(n.target is aten.sin.default for n in graph.graph.nodes))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return ullage.checkpoint(lambda x, w: torch.sin(x @ w) @ w, x, w, keep=keep)

    torch._dynamo.reset()
    x, w = inputs(*XW)
    torch.compile(f, fullgraph=True, backend=backend)(x, w).sum().backward()
    assert sum(counts) == sins


@needs_dynamo
@pytest.mark.filterwarnings("ignore:Detected that context_fn is passed")
def test_a_planned_model_is_one_graph_under_compile() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    seen = []
    for call in (
        net,
        torch.compile(
            lambda x: ullage.checkpoint(net, x, keep="addmm[0]+gelu[0]"), backend="aot_eager", fullgraph=True
        ),
    ):
        net.zero_grad()
        call(x).square().sum().backward()
        seen.append([bits(p.grad) for p in net.parameters()])
    assert seen[0] == seen[1]


def test_calls_that_do_not_run_are_told_by_name() -> None:
    x, w = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    text = "its forward does not run _scaled_dot_product_flash_attention_for_cpu\\[0\\]\\+mm\\[2-4\\], which it was told to keep"
    with pytest.warns(ullage.UllageWarning, match=text):
        ullage.checkpoint(_f, x, w, keep="mm[0,2-4]+_scaled_dot_product_flash_attention_for_cpu[0]").sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(_f(x, w).sum(), x)[0])  # type: ignore[arg-type]


def _attends(x: Tensor, w: Tensor) -> Tensor:
    h = (x @ w).view(1, 2, 8, 8)
    return nn.functional.scaled_dot_product_attention(h, h.sin(), h).exp()


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"])
def test_attention_by_its_portable_name_and_by_a_kernels(name: str) -> None:
    """A rule that was made on another device names the op, an old file a kernel: a replay runs neither again."""
    kernel, other = (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
    )
    rule, portable = OpsRule.from_text(f"{name}[0]"), not name.startswith("_")
    assert rule(kernel, 0) and not rule(kernel, 1) and kernel in rule.ops
    assert rule(other, 0) == (rule.kind_of(other) == rule.kind_of(kernel)) == (other in rule.ops) == portable
    assert rule.not_among([kernel]) == "" and rule.not_among([aten.mm.default]) == f"{name}[0]"
    truth, counts = gradients(_attends, inputs((16, 8), (8, 8)), plain), []
    for keep in (None, f"{name}[0]"):
        seen: list[Any] = []

        def wrap(fn: Any, *args: Any, keep: Any = keep) -> Any:
            return ullage.checkpoint(fn, *args, keep=keep)

        for _ in range(2):
            ops = ops_in(lambda wrap=wrap, seen=seen: seen.append(gradients(_attends, inputs((16, 8), (8, 8)), wrap)))  # type: ignore[misc]
        assert seen == [truth, truth]
        counts.append(ops[kernel])
    assert counts == [2, 1]
