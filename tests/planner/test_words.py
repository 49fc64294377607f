"""What plans and profiles say: facts first, actions by module and meaning, equal layers together, advice that can be followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import nn

import ullage as ul
from tests.small import blocks
from ullage import _progress
from ullage.planner.plan._grouped import rows_of, template, together
from ullage.workload import Setup, load_target

ROOFLINE: dict[str, Any] = {"costs": "roofline"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ul.Workload:
    path = tmp_path_factory.mktemp("config") / "config.json"
    sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=99)
    path.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}))
    return load_target(str(path), batch=2, seq=64, optimizer="lion", dtype="fp32")


def test_a_plan_says_what_it_is_for_and_what_it_does(llama: ul.Workload) -> None:
    plan = ul.plan(llama, None, device="h100", policy="selective", **ROOFLINE)
    said = str(plan).splitlines()
    assert said[:6] == [
        "plan (selective) for h100-80gb, an ESTIMATE: it is not here",
        "  model      LlamaForCausalLM, 154 K parameters in float32",
        "  batch      2, sequence 64, autocast off",
        "  optimizer  Lion, 4.00 bytes of state per trained parameter",
        "  device     h100-80gb, 78.51 GiB",
        "  budget     none",
    ]
    assert "  fits       yes, less than 1 % of h100-80gb" in said
    assert "    model.layers.0-2 (3): keeps q, k, v, o, gate, up, down projections and" in said
    assert "      attention; recomputes norms and SwiGLU" in said
    assert "select:" not in str(plan) and max(map(len, said)) <= 80
    assert "      select:matmul_attention" in plan.describe(verbose=True).splitlines()
    assert {d.words for d in plan.decisions} == {
        "keeps everything",
        "keeps q, k, v, o, gate, up, down projections and attention; recomputes norms and SwiGLU",
    }


def test_a_profile_groups_equal_layers(llama: ul.Workload) -> None:
    profile = ul.profile(llama, options=False, **ROOFLINE)
    said = str(profile)
    assert "    model.layers.0-2 (3): LlamaDecoderLayer\n" in said and "select:" not in said
    assert all(not u.options for u in profile.units)
    assert profile.setup is not None and profile.setup.shapes == ["input_ids 2 x 64 int64", "labels 2 x 64 int64"]


def test_what_is_verified_measured_and_checked_says_what_it_is_of() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    work = ul.Workload(model, torch.ones(2, 4), loss=lambda y, x: y.sum(), optimizer=torch.optim.Adam)
    plan = ul.plan(work, policy="every_block", **ROOFLINE)
    lines = [
        "  model      Sequential, 20 parameters in float32",
        "  batch      2, autocast off",
        "  optimizer  Adam, 8.40 bytes of state per trained parameter",  # 8 a number, 4 for the count of each tensor
    ]
    for found in (
        ul.verify(work, plan, steps=1),
        ul.measure(work, steps=1),
        ul.check(work, max_peak=10**6, costs="roofline"),
    ):
        said = str(found).splitlines()
        assert [line for line in said if line in lines] == lines and "  device     cpu" in "\n".join(said)


def test_whether_it_fits() -> None:
    facts = dict(
        model="M", parameters=10, trained=10, dtypes=["float32"], batch=1, shapes=[], sequence=None, accumulate=1
    )
    facts |= dict(autocast="", optimizer="", optimizer_bytes=0, device="h200", defaults=[])
    setup = Setup(**facts, memory_bytes=100)
    assert (
        setup.fits(41) == "yes, 41 % of h200"
        and setup.fits(470) == "no, 4.7 x h200"
        and setup.fits(101) == "no, 1.1 x h200"
    )
    assert Setup(**facts, memory_bytes=None).fits(1) == "not known: the memory of h200 is not"


def test_defaults_and_a_budget_above_the_device_are_said() -> None:
    model = nn.Linear(4, 4)
    work = ul.Workload(model, torch.ones(2, 4), loss=lambda y, x: y.sum(), notes=("batch 1 is a default",))
    plan = ul.plan(work, "1000GiB", device="t4-16gb", **ROOFLINE)
    assert "  note: batch 1 is a default" in str(plan)
    assert plan.notes[-1] == "the budget of 1000.00 GiB is above the memory of t4-16gb, 14.16 GiB"


def test_names_of_equal_layers() -> None:
    assert template("model.layers.12.mlp") == template("model.layers.3.mlp") == "model.layers.*.mlp"
    assert template("0") == "*" and template("conv2d.weight") == "conv2d.weight"
    assert together(["h.0", "h.1", "h.2", "h.7", "h.9", "h.10"]) == "h.0-2,7,9-10 (6)"
    assert together(["a.0.b.1", "a.1.b.0"]) == "a.0.b.1 .. a.1.b.0 (2)"
    assert together(["head"]) == "head"


def test_the_smallest_budget() -> None:
    plan = ul.plan(blocks(), "smallest", **ROOFLINE)
    assert plan.budget_bytes == plan.predicted.peak_bytes
    with pytest.raises(ul.BudgetInfeasible) as caught:
        ul.plan(blocks(), plan.budget_bytes - 1, **ROOFLINE)
    assert caught.value.smallest_bytes == plan.budget_bytes


def test_a_budget_below_what_no_plan_changes_is_refused_at_once() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    work = ul.Workload(
        model, torch.ones(2, 64), loss=lambda y, x: y.sum(), optimizer=torch.optim.AdamW(model.parameters())
    )
    said: list[str] = []
    with pytest.raises(ul.BudgetInfeasible, match="fewer trained parameters") as caught:
        ul.plan(work, "100KiB", progress=said.append, **ROOFLINE)
    assert not [line for line in said if "option" in line]  # nothing but the plain step was captured
    held = "parameters 130.00 KiB, gradients 130.00 KiB, optimizer state 260.06 KiB, and the update's temporaries. It takes an optimizer"
    assert held in str(caught.value)
    assert caught.value.smallest_bytes == ul.plan(work, "smallest", **ROOFLINE).budget_bytes


def test_advice_is_not_circular() -> None:
    model = nn.Linear(64, 64)
    for optimizer, less in (
        (torch.optim.AdamW(model.parameters()), True),
        (torch.optim.Adagrad(model.parameters()), True),
    ):
        work = ul.Workload(model, torch.ones(2, 64), loss=lambda y, x: y.sum(), optimizer=optimizer)
        levers = [x.how for x in ul.bounds(work, **ROOFLINE).levers if x.what == "optimizer state"]
        assert [how.startswith("an optimizer with less state") for how in levers] == [less]


def test_progress_is_shown_on_a_terminal_only(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "PATIENCE_SECONDS", 0.0)
    ul.profile(blocks(), **ROOFLINE)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    ul.profile(blocks(), progress=False, **ROOFLINE)
    assert capsys.readouterr().err == ""
    ul.profile(blocks(), **ROOFLINE)
    said = capsys.readouterr().err
    assert "ullage: capturing" in said and said.endswith("\r\x1b[K")


def test_an_old_file_of_a_plan_is_read(tmp_path: Path) -> None:
    ul.plan(blocks(), None, policy="every_block", **ROOFLINE).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    data.pop("setup")
    for d in data["decisions"]:
        d.pop("words")
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert ": recompute" in str(ul.Plan.load(tmp_path / "plan.json"))


def test_rows_say_totals() -> None:
    class Row:
        def __init__(self, unit: str, words: str, nbytes: int) -> None:
            self.unit, self.words, self.label, self.reason = unit, words, words, "fits"
            self.bytes_freed, self.seconds_added = nbytes, 0.0

    rows = [
        Row("h.0", "keeps everything", 0),
        Row("h.1", "recomputes everything", 2**20),
        Row("h.3", "recomputes everything", 2**20),
    ]
    assert rows_of(rows) == [
        "h.0: keeps everything",
        "  fits",
        "h.1,3 (2): recomputes everything",
        "  frees 2.00 MiB, adds 0.00 ms in all; fits",
    ]


def test_plans_name_ops_that_every_device_has() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(2, 64, 3, 4, 8).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 64, 32)
            return x + torch.tanh(self.out(torch.sigmoid(torch.tanh(y))))

    model = nn.Sequential(*(Attention() for _ in range(3)))
    work = ul.Workload(model, torch.randn(2, 64, 32), loss=lambda y, x: y.sum())
    pins = {"*": "select:scaled_dot_product_attention[0]"}
    for device in (None, "h200"):
        found = ul.profile(work, device, **ROOFLINE).units[0].options
        named = [o.name for o in found if "attention[" in o.name]
        assert named and not any("_for_cpu" in name or "flash" in name for name in named)
    plan = ul.plan(work, None, policy="every_block", pin=pins, **ROOFLINE)
    assert plan.decisions[0].words.startswith("keeps attention; recomputes")
    assert ul.verify(work, plan, steps=1).ok and ul.measure(work, plan, steps=1).peak_bytes == plan.predicted.peak_bytes
    with plan.apply(model) as handle:
        model(work.batch).sum().backward()
        assert not any(u.note for u in handle.report().units)
    first, *rest = plan.decisions
    edited = [structs.replace(first, action="select:gelu[0]+scaled_dot_product_attention[1]"), *rest]
    other = structs.replace(plan, decisions=edited)
    text = r"0: its forward does not run gelu\[0\]\+scaled_dot_product_attention\[1\], which it was told to keep"
    with other.apply(model), pytest.warns(ul.UllageWarning, match=text):
        model(work.batch)
