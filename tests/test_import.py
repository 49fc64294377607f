"""What `import ullage` adds to a process, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from ullage.runtime.ops._keep import _ops_of

SCRIPT = """
import gc, json, logging, os, random, signal, sys, threading, warnings
import torch
state = lambda: (
    torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(), torch.get_default_dtype(),
    threading.active_count(), signal.getsignal(signal.SIGINT), sys.excepthook, os.getcwd(), gc.isenabled(), gc.get_threshold(),
)
before = state()
modules, environment, filters, path = set(sys.modules), dict(os.environ), list(warnings.filters), list(sys.path)
levels = {name: logger.level for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
import ullage
added = sorted(set(sys.modules) - modules)
print(json.dumps({
    "added": added,
    "environment": environment == dict(os.environ),
    "filters": filters == warnings.filters,
    "path": path == sys.path,
    "state": before == state(),
    "levels": all(logging.getLogger(name).level == level for name, level in levels.items()),
}))
"""


def test_what_an_import_adds() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    added = found.pop("added")
    assert found == {"environment": True, "filters": True, "path": True, "state": True, "levels": True}
    assert len(added) <= 300
    assert not [
        name
        for name in added
        if name.partition(".")[0] in ("scipy", "sympy", "plotly", "plotext", "rich", "transformers")
    ]
    assert not [name for name in added if name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed"))]


def test_dynamo_takes_ops_of_a_rule_for_constants() -> None:
    """They are marked by hand, as torch's own function would import Dynamo at `import ullage`."""

    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)  # type: ignore[no-untyped-call]
    assert vars(marked) == vars(_ops_of)


HELP = """
import json, sys
from ullage_cli._main import cli, run
for line in (["--help"], ["--version"], ["nonsense"], *([verb, "--help"] for verb in cli.commands), ["plan"]):
    assert run(line) in (0, 2)
print(json.dumps([name for name in ("torch", "numpy", "ullage", "rich", "msgspec") if name in sys.modules]))
"""


def test_help_and_bad_usage_import_no_torch() -> None:
    run = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == []
    assert run.stdout.count("Usage: ullage") == 14  # the command's and its verbs'
    assert run.stderr.count("error: ") == 2
