"""Load a workload from a target: `path/file.py:factory`, `package.module:factory`, or a Hugging Face `config.json`."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ullage._errors import UllageError, WorkloadError
from ullage.workload._config import workload_from_config
from ullage.workload._workload import Workload

_EXPECTED = "expected path/file.py:factory, package.module:factory or config.json"


def load_target(
    target: str,
    *,
    batch: int | None = None,
    seq: int | None = None,
    dtype: str | None = None,
    optimizer: str | None = None,
    autocast: str | None = None,
    accumulate: int | None = None,
    lora: str | None = None,
    base: str | None = None,
) -> Workload:
    """Return a workload for a target: `path/file.py:factory`, `package.module:factory`, or a Hugging Face `config.json`.

    It is built when it is needed, so the model may be far larger than this machine. While a file target or its factory runs it can import its neighbours; `sys.path` is as it was afterwards, so that a step which imports
    some needs their folder there.

    Args:
        target: as above.
        batch: micro-batch size; this and the rest are for configs, a factory sets its own.
        seq: sequence length; default: all positions the model has, but 4,096 at most, or 512 if it says nothing.
        dtype: of parameters: "fp32", "bf16", "fp16" or torch's names; default: the config's, or "fp32".
        optimizer: "adamw" (the default), "adamw-fused", "adamw-foreach", "adamw-forloop", "adamw-8bit", "adamw-master" (float32
            copies of the parameters), "adafactor", "muon", "lion", "sgd", "sgd-momentum" or "none".
        autocast: None, or a dtype as above.
        accumulate: micro-batches per step.
        lora: None, or adapters on a frozen model: "r=16,targets=all-linear", "r=8,alpha=16,targets=q_proj+v_proj".
        base: with `lora`: None, or "4bit" for frozen linear layers in NF4, as QLoRA has them.

    Raises:
        WorkloadError: the target can't be found, imported or understood.
    """
    if target.endswith(".json"):
        return workload_from_config(target, batch, seq, dtype, optimizer, autocast, accumulate, lora, base)
    given = {"batch": batch, "seq": seq, "dtype": dtype, "optimizer": optimizer, "autocast": autocast}
    check_factory_options(target, **given, accumulate=accumulate, lora=lora, base=base)
    return Workload.from_factory(find_factory(target))


def check_factory_options(target: str, **options: Any) -> None:
    """Raise WorkloadError for options of `load_target` that a factory would not heed."""
    given = [f"--{k}" for k, v in options.items() if v is not None]
    if given:
        raise WorkloadError(
            f"target={target!r}: {', '.join(given)}: for config.json targets only; a factory sets its own"
        )


def find_factory(target: str) -> Callable[..., Workload]:
    """The callable that a target names; WorkloadError if there is none."""
    where, _, name = target.rpartition(":")
    if not where or not name:
        what = "there is a file of this name; which factory in it? " if Path(target).is_file() else ""
        raise WorkloadError(f"target={target!r}: {what}{_EXPECTED}")
    try:
        module = _load_file(Path(where), target) if where.endswith(".py") else _import(where)
    except UllageError:
        raise
    except ModuleNotFoundError as error:
        raise WorkloadError(f"target={target!r}: no module {error.name!r}; {_EXPECTED}") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise WorkloadError(f"target={target!r}: importing {where} raised {type(error).__name__}: {error}") from error
    factory = getattr(module, name, None)
    if factory is None:
        callables = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(name, callables, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise WorkloadError(f"target={target!r}: {where} has no {name!r}{hint}")
    if not callable(factory):
        raise WorkloadError(f"target={target!r}: {name!r} is a {type(factory).__name__}, not a callable; {_EXPECTED}")
    folder = _folder_of(where).resolve()

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> Workload:
        with _beside(folder):  # it may import its neighbours when it is called
            return factory(*args, **kwargs)  # type: ignore[no-any-return]

    return build


def beside_target(target: str) -> contextlib.AbstractContextManager[None]:
    """Inside it, modules beside a target can be imported by its steps, too."""
    return _beside(_folder_of(target.rpartition(":")[0]))


def _folder_of(where: str) -> Path:
    return Path(where).parent if where.endswith(".py") else Path.cwd()


def _import(name: str) -> Any:
    with _beside(_folder_of(name)):  # as `python -m` has it
        return importlib.import_module(name)


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Make modules in a folder importable; afterwards the search path is as before, except for entries that the code has added."""
    here = str(folder.resolve())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _load_file(path: Path, target: str) -> Any:
    if not path.is_file():
        raise WorkloadError(f"target={target!r}: no file {path}")
    spec = importlib.util.spec_from_file_location(f"ullage_target_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(spec.name)  # of another file of that name
    sys.modules[spec.name] = module
    try:
        with _beside(_folder_of(str(path))):  # its neighbours, as when the file is run
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        if before is not None:
            sys.modules[spec.name] = before
        raise
    return module
