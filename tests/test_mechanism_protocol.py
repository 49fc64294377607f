"""A mechanism is one file: the one of docs/extending.md goes through everything, and nothing outside `mechanisms/` names any."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ullage as ul
from ullage.mechanisms import Mechanism, Option, mechanisms, register, unregister
from ullage_cli import _main as cli

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
CODE = "\n".join(
    re.findall(r"^```python(?: continued)?\n(.*?)^```", PAGE, re.S | re.M)[:3]
)  # the mechanism and a workload


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's module, whose mechanism is registered for this file's tests."""
    path = tmp_path_factory.mktemp("toy") / "bits_toy.py"
    path.write_text(CODE)
    module = ModuleType("bits_toy")
    module.__file__ = str(path)
    sys.modules["bits_toy"] = module
    exec(compile(path.read_text(), path, "exec"), vars(module))
    yield module
    unregister("bits")
    del sys.modules["bits_toy"]


@pytest.fixture(scope="module")
def plain(toy: ModuleType) -> ul.Plan:
    return ul.plan(toy.workload(), policy="none", costs="roofline")


def actions(plan: ul.Plan) -> list[str]:
    return [d.action for d in plan.decisions]


def test_the_solver_chooses_it(toy: ModuleType, plain: ul.Plan) -> None:
    """A budget that only masks stand in the way of: packing two of four is cheaper than running anything again."""
    mask = 4096 * 64
    plan = ul.plan(toy.workload(), plain.predicted.peak_bytes - mask, costs="roofline")
    assert set(actions(plan)) == {"bits", "keep"}
    assert plan.predicted.peak_bytes <= plain.predicted.peak_bytes - mask
    assert plan.predicted.step_seconds > plain.predicted.step_seconds
    assert ul.verify(toy.workload(), plan).ok


def test_policy_pin_and_forbid(toy: ModuleType, plain: ul.Plan) -> None:
    everywhere = ul.plan(toy.workload(), policy="bits", costs="roofline")
    assert actions(everywhere) == ["bits"] * 4
    assert plain.predicted.peak_bytes - everywhere.predicted.peak_bytes == 4 * 4096 * 64 * 7 // 8
    pinned = ul.plan(toy.workload(), policy="none", pin={"blocks.2": "bits"}, costs="roofline")
    assert actions(pinned) == ["keep", "keep", "bits", "keep"]
    budget = plain.predicted.peak_bytes - 4096 * 64
    without = ul.plan(toy.workload(), budget, forbid=["bits"], costs="roofline")
    assert "bits" not in actions(without)
    with pytest.raises(ul.ArgumentError, match=r"forbid 'bit': no such action; expected keep, .*offload:disk, bits$"):
        ul.plan(toy.workload(), budget, forbid=["bit"], costs="roofline")


def test_a_unit_that_does_not_offer_it_says_why(toy: ModuleType) -> None:
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()) for _ in range(2)))
    work = ul.Workload(model, torch.ones(4, 8), loss=lambda out, x: out.sum())
    with pytest.raises(ul.ArgumentError, match="can't have it: it runs no op that saves a mask; possible: keep"):
        ul.plan(work, policy="none", pin={"0": "bits"}, costs="roofline", units=["0", "1"])


def test_apply_report_and_file(toy: ModuleType, tmp_path: Path) -> None:
    plan = ul.plan(toy.workload(), policy="bits", costs="roofline")
    plan.save(tmp_path / "plan.json")
    loaded = ul.Plan.load(tmp_path / "plan.json")
    assert loaded.digest == plan.digest
    found = []
    for planned in (False, True):
        work = toy.workload()
        handle = loaded.apply(work.model) if planned else None
        work.model(work.batch).backward()
        found.append([p.grad for p in work.model.parameters()])
        if handle is not None:
            rows = handle.report().units
            assert [(u.action, u.fired, u.recomputed) for u in rows] == [("bits", 1, 0)] * 4
            handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_measured_peak_is_the_predicted_one(toy: ModuleType) -> None:
    plan = ul.plan(toy.workload(), policy="bits", costs="roofline")
    assert ul.measure(toy.workload(), plan, steps=1).peak_bytes == plan.predicted.peak_bytes


def test_frontier_timeline_and_report(toy: ModuleType) -> None:
    found = ul.frontier(toy.workload(), points=4, costs="roofline")
    assert "bits" in [p.policy for p in found.policies]
    assert any("bits" in actions(p.plan) for p in found.points)
    plan = ul.plan(toy.workload(), policy="bits", costs="roofline")
    assert "bits" in str(ul.report(toy.workload(), plan, costs="roofline"))
    assert set(ul.timeline(toy.workload(), plan, costs="roofline").actions.values()) == {"bits"}


def test_the_command(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    target = f"{toy.__file__}:workload"

    def run(*arguments: str) -> Any:
        assert cli.run([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    unregister("bits")  # as in a new process: the file registers it
    common = ["--costs", "roofline"]
    plan = run("plan", target, "--policy", "none", "--pin", "blocks.*=bits", "-o", "plan.json", *common)
    assert [d["action"] for d in plan["decisions"]] == ["bits"] * 4
    unregister("bits")
    assert run("verify", target, "--plan", "plan.json", "--steps", "1")["ok"]
    assert "bits" in [p["policy"] for p in run("frontier", target, "--points", "3", *common)["policies"]]
    unregister("bits")
    register(toy.Bits())


def test_a_file_that_names_an_unknown_mechanism(toy: ModuleType, tmp_path: Path) -> None:
    ul.plan(toy.workload(), policy="bits", costs="roofline").save(tmp_path / "plan.json")
    unregister("bits")
    try:
        with pytest.raises(ul.PlanError, match="bits"):
            ul.Plan.load(tmp_path / "plan.json")
    finally:
        register(toy.Bits())


def test_registering(toy: ModuleType) -> None:
    toy_again = type("Bits", (toy.Bits,), {"__module__": toy.Bits.__module__, "__qualname__": toy.Bits.__qualname__})
    register(toy_again())  # as a notebook's cell that is run again
    assert type(Option("bits").mechanism) is toy_again
    register(toy.Bits())

    class Nameless(Mechanism):
        pass

    class Second(Mechanism):
        action = "recompute"

    with pytest.raises(ul.ArgumentError, match="mechanism Nameless: action=None: expected a lower-case identifier"):
        register(Nameless())
    with pytest.raises(ul.ArgumentError, match=r"mechanism Second: .*recompute.Recompute has the action 'recompute'"):
        register(Second())


def test_options_are_what_their_names_say() -> None:
    for name in ("keep", "recompute", "select:mm[0,2]@disk", "offload:host"):
        option = ul.mechanisms.option_from_name(name)
        assert (option.name, option.mechanism.action) == (name, name.partition(":")[0])
    assert Option("select", "mm[0]@disk").tier == "disk" and not Option("select", "mm[0]").offloads


def test_nothing_outside_names_an_action() -> None:
    """Whatever the rest does with a mechanism it asks the mechanism."""
    known = {m.action for m in mechanisms()}
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        if "mechanisms" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                action, colon, level = node.value.partition(":")
                if (
                    action in known
                    and not level.startswith(" ")
                    and (path.name, node.value) != ("_checkpoint.py", "keep")
                ):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}")
    assert found == []
