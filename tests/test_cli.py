"""The command: results, progress, errors and exit codes, for people and for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ullage as ul
from tests.broken import without_rng
from ullage_cli import _progress
from ullage_cli._main import cli, run

ROOT = Path(__file__).parents[1]
FACTORY = f"{ROOT}/tests/small.py:tiny"
BLOCKS = f"{ROOT}/tests/small.py:blocks"  # planned in a second
FAST = ["--costs", "roofline"]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("plans") / "plan.json")
    assert run(["plan", FACTORY, "--policy", "every_block", "-o", path, *FAST]) == 0
    return path


def test_help_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ([], *([v] for v in cli.commands)):
        assert run([*verb, "--help"]) == 0
        said = capsys.readouterr().out
        assert "Usage: ullage" in said and "-h, --help" in said
    for verb in cli.commands:
        run([verb, "-h"])
        assert "--json" in capsys.readouterr().out
    assert run(["--version"]) == 0


def test_every_verb(plan_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text, key in (
        (["profile", FACTORY, *FAST], "alive at the peak", "peak_bytes"),
        (["plan", BLOCKS, "--budget", "90% of plain", *FAST], "decisions", "budget_bytes"),
        (["verify", FACTORY, "--plan", plan_file, "--steps", "1"], "ok: bitwise equal", "ok"),
        (["verify", FACTORY, "--plan", plan_file, "--scope", "units"], "by units", "ok"),
        (["measure", FACTORY, "--plan", plan_file, "--steps", "1"], "samples/s", "step_seconds"),
        (["measure", FACTORY, "--steps", "1"], "peak", "peak_bytes"),
        (["devices"], "h200", "h200"),
    ):
        assert run(arguments) == 0
        assert text in capsys.readouterr().out
        assert run([*arguments, "--json"]) == 0
        out = capsys.readouterr().out
        assert key in json.loads(out)


def test_a_plan_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", BLOCKS, "--budget", "90% of plain", "-o", "plan.json", *FAST]) == 0
    assert "written to plan.json" in capsys.readouterr().out
    assert ul.Plan.load(tmp_path / "plan.json").policy == "optimal"


BAD: dict[str, tuple[list[str], str, str]] = {
    "no file": (["profile", "nowhere.py:f"], "WorkloadError", "no file nowhere.py"),
    "no option": (["plan", FACTORY, "--colour", "red"], "UsageError", "No such option.*see `ullage plan --help`"),
    "no target": (["plan"], "UsageError", "Missing argument 'TARGET'; see `ullage plan --help`"),
    "no verb": (["plna"], "UsageError", "No such command 'plna'"),
    "batch": (["profile", "x.json", "--batch", "0"], "UsageError", "--batch"),
    "budget": (["plan", FACTORY, "--budget", "6 potatoes"], "BudgetError", "potatoes"),
    "fraction": (["plan", FACTORY, "--budget", "0.5"], "BudgetError", "without its unit"),
    "no budget": (["plan", FACTORY], "BudgetError", "policy='every_block'"),
    "device": (["profile", FACTORY, "--device", "h20"], "DeviceError", "did you mean 'h200'"),
    "policy": (["plan", FACTORY, "--policy", "best"], "ArgumentError", "policy='best'"),
    "no plan": (["verify", FACTORY, "--plan", "none.json"], "PlanError", "none.json: can't be read"),
    "folder": (["plan", FACTORY, "-o", "no/such/plan.json"], "ArgumentError", "there is no folder no/such"),
    "factory's own": (["profile", FACTORY, "--batch", "3"], "WorkloadError", "a factory sets its own"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, kind, message = BAD[name]
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("error: ") and not said.out
    assert run([*arguments, "--json"]) == 2
    said = capsys.readouterr()
    error = json.loads(said.out)
    assert error["error"] == kind and not said.err
    import re

    assert re.search(message, error["message"])
    assert not list(tmp_path.iterdir())


def test_an_infeasible_budget(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", BLOCKS, "--budget", "1KiB", "-o", "plan.json", *FAST]
    assert run(arguments) == 3
    said = capsys.readouterr().err
    assert "smallest peak" in said and said.count("\nerror: ") + said.startswith("error: ") == 1
    assert run([*arguments, "--json"]) == 3
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == "BudgetInfeasible" and len(error["bound_by"]) == 3
    assert run(["plan", BLOCKS, "--budget", str(error["smallest_bytes"]), *FAST]) == 0
    assert not Path("plan.json").exists()


def test_a_failed_check_and_a_failing_step(plan_file: str, monkeypatch: Any, capsys: Any) -> None:
    with without_rng(monkeypatch), pytest.warns(ul.UllageWarning, match="its replay gave other values"):
        assert run(["verify", FACTORY, "--plan", plan_file, "--steps", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out
    Path("bad.py").write_text(
        "import torch, ullage as ul\n"
        "def f():\n"
        "    def step(m, x):\n"
        "        raise KeyError('mine')\n"
        "    return ul.Workload(torch.nn.Linear(2, 2), torch.ones(1, 2), step=step)\n"
    )
    assert run(["measure", "bad.py:f"]) == 2
    assert "bad.py:4: the step itself raises KeyError: 'mine'" in capsys.readouterr().err


def test_nothing_is_said_meanwhile_in_a_pipe_or_with_json(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with _progress.progress() as report:
        report("slow", 1, 2)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with _progress.progress(as_json=True) as report:
        report("slow")
    said = capsys.readouterr()
    assert said.err == said.out == ""


def test_a_bar_on_a_terminal(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with _progress.progress() as report:
        report("training", 1, 2)
    assert "training" in capsys.readouterr().err


SIZES = {
    "llama": (
        "LlamaForCausalLM",
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    ),
    "t5": ("T5ForConditionalGeneration", dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)),
    "vit": (
        "ViTForImageClassification",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32),
    ),
}


@pytest.mark.parametrize("kind", SIZES)
def test_a_config(kind: str, capsys: Any) -> None:
    name, sizes = SIZES[kind]
    more = {} if kind == "vit" else {"vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 0}
    Path("config.json").write_text(json.dumps({"model_type": kind, "architectures": [name], **sizes, **more}))
    target = ["config.json", "--batch", "2", *([] if kind == "vit" else ["--seq", "16"])]
    costs = FAST if kind == "t5" else []  # timing its ops takes long
    assert run(["plan", *target, "--policy", "every_block", "-o", "plan.json", "--json", *costs]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]["peak_bytes"]
    assert run(["measure", *target, "--plan", "plan.json", "--steps", "1", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["peak_bytes"]
    assert kind == "t5" or abs(predicted / measured - 1) < 0.01
    assert run(["verify", *target, "--plan", "plan.json", "--steps", "1"]) == 0


def test_a_short_demo(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ullage.demo._demo as demo

    monkeypatch.setattr(demo, "BATCH", 4)
    monkeypatch.setattr(demo, "SEQ", 128)
    monkeypatch.setattr(demo, "LAYERS", 3)
    assert run(["demo", "--steps", "4", "--budget", "90% of plain"]) == 0
    said = capsys.readouterr().out
    assert "losses identical to the last bit: yes" in said and "within 1 % of the measured peak: yes" in said
    assert ul.Plan.load("plan.json").decisions


@pytest.mark.parametrize("module", ["ullage", "ullage_cli", "ullage.cli"])
def test_the_module_runs(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "devices", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and "h200" in json.loads(done.stdout) and not done.stderr


def test_overrides_and_bounds(capsys: Any) -> None:
    pins = ["--pin", "blocks.0=recompute", "--pin", "blocks.1=keep", "--forbid", "select", "--headroom", "1000"]
    assert run(["plan", BLOCKS, "--budget", "95% of plain", *pins, "--simple", "-o", "plan.json", *FAST]) == 0
    said = capsys.readouterr().out
    assert "pin blocks.0=recompute (1 unit): step +" in said and "forbidden: select" in said and "headroom" in said
    plan = ul.Plan.load("plan.json")
    assert [d.action for d in plan.decisions][:2] == ["recompute", "keep"] and plan.headroom_bytes == 1000
    for arguments, text in ((["--plan", "plan.json"], "backward"), (FAST, "what would lower it")):
        assert run(["bounds", BLOCKS, *arguments]) == 0
        assert text in capsys.readouterr().out
    assert run(["bounds", BLOCKS, *FAST, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["levers"] and found["by_category"] and found["peak_bytes"] == plan.baseline.peak_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pin", "blocks.0"], "--pin blocks.0: expected GLOB=ACTION"),
        (["--pin", "a=keep", "--pin", "a=recompute"], "--pin a=recompute: a is pinned to keep already"),
        (["--pin", "x.*=keep"], "pin 'x.*': no unit has such a name"),
        (["--forbid", "swap"], "forbid 'swap': no such action"),
        (["--headroom", "lots"], "headroom='lots': not a size"),
    ],
)
def test_bad_overrides(arguments: list[str], message: str, capsys: Any) -> None:
    assert run(["plan", FACTORY, "--budget", "90% of plain", *arguments, *FAST]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
