"""`ullage frontier` and `ullage fit`: tables, JSON, files, the plot, errors and exit codes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import ullage as ul
from ullage_cli._main import run

ROOT = Path(__file__).parents[2]
FACTORY = f"{ROOT}/tests/small.py:blocks"
FAST = ["--costs", "roofline"]
FRONTIER = ["frontier", FACTORY, "--points", "4", *FAST]
FIT = ["fit", FACTORY, "--at-least", "64", *FAST]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


def test_frontier(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*FRONTIER, "-o", "frontier.json", "--picture", "frontier.svg"]) == 0
    said = capsys.readouterr().out
    found = ul.Frontier.load("frontier.json")
    assert str(found) in said and "o plans  a none" in said and "\x1b" not in said
    assert said.endswith("written to frontier.json\nwritten to frontier.svg\n")
    assert Path("frontier.svg").read_text().startswith("<?xml")
    assert run([*FRONTIER, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("frontier.json").read_text())


def test_frontier_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("matplotlib", "plotext") else find(n))
    assert run(FRONTIER) == 0
    said = capsys.readouterr().out
    assert "named policies" in said and said.endswith("needs plotext; pip install 'ullage[plot]'\n")
    assert run([*FRONTIER, "--picture", "frontier.svg"]) == 2
    assert capsys.readouterr().err == "error: frontier.svg: a picture needs matplotlib; pip install 'ullage[plot]'\n"


def test_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*FIT, "--budget", "400KiB"]
    assert run([*arguments, "-o", "plan.json"]) == 0
    said = capsys.readouterr().out
    assert "largest  batch=316: " in said and "fastest  batch=256: " in said and said.endswith("written to plan.json\n")
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value"] == 316 and found["unit"] == "samples/s"
    plan = ul.Plan.load("plan.json")
    assert plan.predicted.peak_bytes == found["plan"]["predicted"]["peak_bytes"] <= plan.budget_bytes == 400 * 1024
    assert run(["fit", FACTORY, "--axis", "layers", "--at-most", "2", "--budget", "409600", *FAST]) == 0
    assert "bound by at_most=2" in capsys.readouterr().out


def test_a_budget_that_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*FIT, "--budget", "1KiB", "-o", "plan.json", "--json"]) == 3
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == "BudgetInfeasible" and "batch=64, the smallest value tried" in error["message"]
    assert run([*FIT, "--budget", str(error["smallest_bytes"]), "--at-most", "64"]) == 0
    assert not Path("plan.json").exists()


def _config(positions: int) -> str:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "pad_token_id": 0,
        **sizes,
    }
    Path("config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    return "config.json"


def test_a_config_along_its_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", _config(300), "--axis", "seq", "--batch", "2", "--dtype", "bf16", "--device", "h200"]
    assert run([*arguments, "--budget", "1GiB"]) == 0
    said = capsys.readouterr().out
    assert "largest  seq=256: " in said and "tokens/s" in said and "ESTIMATE" in said
    assert "bound by seq=384: the model has 300 positions" in said


BAD: dict[str, tuple[list[str], str, str]] = {
    "points": (["frontier", FACTORY, "--points", "1"], "UsageError", "--points"),
    "folder": (["frontier", FACTORY, "-o", "no/frontier.json"], "ArgumentError", "there is no folder no"),
    "picture": (["frontier", FACTORY, "--picture", "frontier.gif"], "ArgumentError", "a picture is one of .svg, .png"),
    "no budget": (["fit", FACTORY], "UsageError", "Missing option '--budget'"),
    "plain": (
        ["fit", FACTORY, "--budget", "50% of plain"],
        "BudgetError",
        "the plain step is another one at each batch",
    ),
    "axis": (["fit", FACTORY, "--budget", "1MiB", "--axis", "seq"], "ArgumentError", "it takes batch, layers, width"),
    "factory's own": (["fit", FACTORY, "--budget", "1MiB", "--seq", "3"], "WorkloadError", "a factory sets its own"),
    "no file": (["fit", "none.json", "--budget", "1MiB"], "WorkloadError", "can't be read"),
    "config's axis": (["fit", "c.json", "--budget", "1MiB", "--axis", "layers"], "ArgumentError", "it is batch or seq"),
    "set": (
        ["fit", "c.json", "--budget", "1MiB", "--batch", "3"],
        "ArgumentError",
        "batch=3: this is what is looked for",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, kind, message = BAD[name]
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("error: ") and message in said.err and not said.out
    assert run([*arguments, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == kind and message in error["message"]
    assert not list(tmp_path.iterdir())
