"""Every error is ours, names the thing, says why and what to do; the model is not touched."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ullage as ul
from tests.small import next_byte, tiny
from ullage.workload import load_target


@pytest.fixture(scope="module")
def plan() -> ul.Plan:
    return ul.plan(tiny(), policy="every_block", costs="roofline")


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        (0.5, "fraction"),
        ("0.5", "without its unit"),
        ("6 potatoes", "'potatoes' is not a unit"),
        (-5, "above zero"),
        (0, "above zero"),
        ("-1GiB", "above zero"),
        ("50%", "50% of plain"),
        ("0% of plain", "above zero"),
        (True, "bool"),
        ("1.2.3% of plain", "not a size"),
        (f"{'9' * 400}GiB", "too large"),
        ("", "not a size"),
    ],
)
def test_budgets(budget: Any, why: str) -> None:
    with pytest.raises(ul.BudgetError, match=f"(?s)budget=.*{why}.*'6GiB' or|{why}"):
        ul.plan(tiny(), budget, costs="roofline")


def _arguments() -> dict[str, tuple[Callable[[ul.Plan], Any], type[Exception], str]]:
    return {
        "costs": (lambda p: ul.profile(tiny(), costs="nonsense"), ul.ArgumentError, "costs='nonsense'.*'roofline'"),
        "policy": (lambda p: ul.plan(tiny(), policy="best"), ul.ArgumentError, "policy='best'.*every_block"),
        "every_n": (lambda p: ul.plan(tiny(), policy="every_n:0"), ul.ArgumentError, "every_n:K"),
        "no budget": (lambda p: ul.plan(tiny()), ul.BudgetError, "policy='every_block'"),
        "units": (lambda p: ul.plan(tiny(), 10**9, units=["x.*"], costs="roofline"), ul.WorkloadError, r"units=\['x"),
        "device": (lambda p: ul.profile(tiny(), device="h20"), ul.DeviceError, "device='h20'.*did you mean 'h200'"),
        "no device": (lambda p: ul.profile(tiny(), device="abacus"), ul.DeviceError, "known: .*h200"),
        "measure": (lambda p: ul.measure(tiny(), steps=0), ul.ArgumentError, "steps=0"),
        "half a step": (lambda p: ul.measure(tiny(), steps=1.5), ul.ArgumentError, "steps=1.5"),
        "verify": (lambda p: ul.verify(tiny(), p, steps=0), ul.ArgumentError, "steps=0"),
        "scope": (lambda p: ul.verify(tiny(), p, scope="all"), ul.ArgumentError, "scope='all'.*units"),
        "work": (lambda p: ul.profile(tiny().model), ul.ArgumentError, "work: expected a ullage.Workload, got GPT"),
        "verify work": (lambda p: ul.verify(tiny().model, p), ul.ArgumentError, "work: .* got GPT"),
        "verify plan": (lambda p: ul.verify(tiny(), "plan.json"), ul.ArgumentError, "plan: .* got str.*Plan.load"),
        "measure plan": (lambda p: ul.measure(tiny(), {}), ul.ArgumentError, "plan: .* got dict"),
        "apply": (lambda p: p.apply(tiny()), ul.ApplyError, "model: expected .* got Workload"),
        "save": (lambda p: p.save("/no/such/folder/plan.json"), ul.ArgumentError, "no folder /no/such/folder"),
    }


@pytest.mark.parametrize("name", _arguments())
def test_arguments(name: str, plan: ul.Plan) -> None:
    call, kind, match = _arguments()[name]
    with pytest.raises(kind, match=match) as caught:
        call(plan)
    assert isinstance(caught.value, ul.UllageError)
    if kind is ul.ArgumentError:
        assert isinstance(caught.value, ValueError)


class Broken(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.inner = what, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.inner(x)
        return {"tensor": y, "none": None, "pair": (y, y), "frozen": y.detach().sum()}[self.what]


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("tensor", r"loss: none was given and the model returned a tensor of shape \(2, 4\); pass loss="),
        ("none", "the model returned a NoneType"),
        ("pair", "the model returned a tuple"),
        ("frozen", "loss: it depends on no parameter"),
    ],
)
def test_losses(what: str, match: str) -> None:
    for call in (lambda w: ul.profile(w, costs="roofline"), lambda w: ul.measure(w, steps=1)):
        with pytest.raises(ul.WorkloadError, match=match):
            call(ul.Workload(Broken(what), torch.ones(2, 4)))


def test_a_loss_that_is_no_scalar() -> None:
    with pytest.raises(ul.WorkloadError, match=r"the callable returned a tensor of shape \(2, 4\)"):
        ul.profile(ul.Workload(Broken("tensor"), torch.ones(2, 4), loss=lambda y, x: y), costs="roofline")


def _other_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": "a name"}, "model: expected a torch.nn.Module, got str"),
        ({"batch": [1, 2]}, "batch: .* got list"),
        ({"accumulate": 0}, "accumulate: .* got 0"),
        ({"autocast": "bf16"}, "autocast: .* got 'bf16'"),
        ({"loss": 3}, "loss: expected a callable"),
        ({"step": 3}, "step: expected a callable"),
        ({"step": print, "loss": print}, "step: does the whole step itself"),
        ({"optimizer": 3}, "optimizer: .* got int"),
        ({"optimizer": _other_optimizer()}, "optimizer: none of its 2 parameters belongs to the model"),
    ],
)
def test_workloads(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ul.WorkloadError, match=match):
        ul.Workload(**({"model": Broken("tensor"), "batch": torch.ones(2, 4)} | arguments))


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (lambda params: None, "the callable returned NoneType"),
        (lambda params: params["x"], "the callable raised TypeE"),
    ],
)
def test_optimizer_callables(optimizer: Any, match: str) -> None:
    work = ul.Workload(Broken("tensor"), torch.ones(2, 4), loss=lambda y, x: y.sum(), optimizer=optimizer)
    for call in (lambda: ul.profile(work, costs="roofline"), lambda: ul.measure(work, steps=1)):
        with pytest.raises(ul.WorkloadError, match=f"optimizer: {match}"):
            call()


def _raises() -> ul.Workload:
    raise OSError("no disk")


def _with_arguments(size: int, depth: int = 2) -> ul.Workload:
    return tiny()


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (_raises, r"factory _raises raised OSError: no disk \(at .*test_bad_input.py:\d+\)"),
        (_with_arguments, "factory _with_arguments: is called without arguments, but asks for size;"),
        (lambda: 3, "factory <lambda>: expected it to return a ullage.Workload, got int"),
        (lambda: None, "got NoneType"),
        (lambda: ul.Workload(3, 3), "^model: expected a torch.nn.Module, got int"),
    ],
)
def test_factories(factory: Any, match: str) -> None:
    for call in (lambda w: ul.profile(w, costs="roofline"), lambda w: ul.measure(w, steps=1)):
        with pytest.raises(ul.WorkloadError, match=match):
            call(ul.Workload.from_factory(factory))
    with pytest.raises(ul.WorkloadError, match="factory: expected a callable"):
        ul.Workload.from_factory(3)  # type: ignore[arg-type]


_CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 64}


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("nowhere.py:f", "no file nowhere.py"),
        ("no.such.package:f", "no module 'no'; expected path/file.py:factory"),
        ("examples/gpt.py", "which factory in it"),
        ("examples/gpt.py:workloda", "has no 'workloda'; did you mean workload"),
        ("examples/gpt.py:__name__", "is a str, not a callable"),
        ("nothing", "expected path/file.py:factory"),
        ("{here}/broken.py:f", "importing .* raised ZeroDivisionError"),
        ("nowhere.json", "can't be read: No such file"),
        ("{here}/half.json", "not JSON"),
        ("{here}/list.json", "not a Hugging Face config"),
        ("{here}/plan.json", "this is a plan; give it as --plan"),
    ],
)
def test_targets(target: str, match: str, tmp_path: Path, plan: ul.Plan) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "half.json").write_text('{"model_type": ')
    (tmp_path / "list.json").write_text("[]")
    plan.save(tmp_path / "plan.json")
    with pytest.raises(ul.WorkloadError, match=match):
        load_target(target.format(here=tmp_path))


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        ({}, {"seq": 65}, r"seq=65: the model has 64 positions \(n_positions in"),
        ({}, {"dtype": "int4"}, "dtype='int4': expected one of fp32"),
        ({}, {"optimizer": "lamb"}, "optimizer='lamb': expected one of adamw, adamw-fused"),
        ({"architectures": ["GPT2Model"]}, {}, "GPT2Model computes no loss; .* GPT2For"),
        ({"architectures": ["GPT99"]}, {}, "has no model class 'GPT99'"),
        ({"model_type": "gpt99"}, {}, "does not take this config"),
        ({"architectures": []}, {}, "needs model_type and architectures"),
        ({"model_type": "bert", "architectures": ["BertForMultipleChoice"]}, {}, "don't know the inputs"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, {"seq": 8}, "takes images"),
        ({"model_type": "llama", "hidden_size": "wide"}, {}, "does not take this config"),
    ],
)
def test_configs(change: Any, options: Any, match: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_CONFIG | change))
    with pytest.raises(ul.WorkloadError, match=match):
        load_target(str(path), **options)


def test_plan_files(tmp_path: Path, plan: ul.Plan) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    text = path.read_text()
    data = json.loads(text)
    decision = data["decisions"][1]
    damage = {
        text[: len(text) // 2]: "cut off",
        "": "cut off",
        "[1]": "not a plan of ullage",
        json.dumps(data | {"version": 99}): "version 99 is newer than this ullage reads .*upgrade",
        json.dumps(data | {"version": 0}): "not a plan of ullage",
        json.dumps(data | {"colour": 1}): "unknown field `colour`",
        json.dumps({k: v for k, v in data.items() if k != "gap"}): "gap",
        json.dumps(data | {"decisions": [decision | {"action": "forget"}]}): "unknown action forget; known: keep",
        json.dumps(data | {"decisions": [decision | {"colour": 1}]}): "colour",
        json.dumps(data | {"decisions": [decision | {"unit": 3}]}): "unit",
    }
    for damaged, match in damage.items():
        path.write_text(damaged)
        with pytest.raises(ul.PlanError, match=match) as caught:
            ul.Plan.load(path)
        assert str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ul.PlanError, match="cut off"):
        ul.Plan.load(path)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ul.PlanError, match="can't be read"):
            ul.Plan.load(missing)


def test_decisions_that_do_not_fit_the_model(tmp_path: Path, plan: ul.Plan) -> None:
    model = tiny().model
    data = json.loads((plan.save(tmp_path / "p"), (tmp_path / "p").read_text())[1])
    block = next(d for d in data["decisions"] if d["unit"] == "blocks.0")
    for extra, match in (
        ({"unit": "blocks.7"}, "decision for 'blocks.7': the model has no such module; did you mean 'blocks"),
        ({"unit": "blocks.0"}, "'blocks.0': that module is decided on already"),
        ({"unit": "blocks.0.qkv", "buffers": ["ema"]}, "'blocks.0.qkv': the module has no buffer 'ema'"),
    ):
        (tmp_path / "p").write_text(json.dumps(data | {"decisions": [*data["decisions"], block | extra]}))
        with pytest.raises(ul.PlanMismatch, match=match):
            ul.Plan.load(tmp_path / "p").apply(model)
        assert all("forward" not in vars(m) for m in model.modules())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, plan: ul.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    import ullage._files as files

    path = tmp_path / "plan.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        plan.save(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_models_that_are_not_the_planned_one(plan: ul.Plan) -> None:
    model = tiny().model
    with plan.apply(model), pytest.raises(ul.ApplyError, match=r"applied to this model already.*remove\(\)"):
        plan.apply(model)
    wrapping_nothing = ul.plan(tiny(), policy="none", costs="roofline")
    with wrapping_nothing.apply(model), pytest.raises(ul.ApplyError, match="applied to this model already"):
        plan.apply(model)
    changed = copy.deepcopy(model)
    changed.embed.weight.requires_grad_(False)
    wider = type(model)(layers=2, width=64, heads=2, seq=64)
    deeper = type(model)(layers=3, width=32, heads=2, seq=64)
    for other, match in (
        (changed, "embed.weight: requires_grad False, planned True"),
        (wider, "shape"),
        (deeper, "blocks.2.* is new"),
        (nn.Linear(2, 2), "class torch.nn.modules.linear.Linear, planned ullage.demo._gpt.GPT"),
        (copy.deepcopy(model).bfloat16(), "dtype bfloat16, planned float32"),
    ):
        for call in (plan.apply, lambda m: ul.measure(ul.Workload(m, torch.zeros(1, 8).long()), plan, steps=1)):
            with pytest.raises(ul.PlanMismatch, match=match):
                call(other)
        assert all("forward" not in vars(m) for m in other.modules())


class Own(nn.Module):
    """Checkpoints by itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.inner = reentrant, nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant).sum()


def test_models_that_are_checkpointed_already(plan: ul.Plan) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for reentrant in (False, True):
        work = ul.Workload(Own(reentrant), torch.ones(2, 4, requires_grad=True))
        with pytest.raises(ul.AlreadyCheckpointed, match="inner.*checkpointed already.*do not stack"):
            ul.profile(work, costs="roofline")
    wrapped = tiny().model
    wrapped.blocks[0] = checkpoint_wrapper(wrapped.blocks[0])
    for call in (plan.apply, lambda m: ul.plan(ul.Workload(m, tiny().batch, next_byte), 10**9, costs="roofline")):
        with pytest.raises(ul.AlreadyCheckpointed, match=r"blocks.0: .*torch's checkpoint_wrapper"):
            call(wrapped)


def test_hugging_faces_switch() -> None:
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    ids = torch.ones(1, 4, dtype=torch.long)
    work = ul.Workload(model, {"input_ids": ids, "labels": ids})
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with pytest.raises(ul.AlreadyCheckpointed, match=r"Hugging Face's switch.*call model.\w+_checkpointing_disable"):
        ul.plan(work, 10**9, costs="roofline")
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    ul.profile(work, costs="roofline")


def test_control_flow_on_activations() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.w(x).sum()
            return y if y > 0 else -y

    found = ul.profile(ul.Workload(Branch(), torch.ones(2, 4)), costs="roofline")
    assert [(r.what, r.how) for r in found.reads] == [("item", "run")]
    assert any("test_bad_input.py:" in n and "that of a real step was taken" in n for n in found.notes)
