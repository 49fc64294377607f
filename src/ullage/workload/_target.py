"""Load a workload from a target: `path/file.py:factory`, `package.module:factory`, or a Hugging Face `config.json`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ullage._errors import WorkloadError
from ullage.workload._workload import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer] | None] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-4),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
    "none": None,
}


def load_target(
    target: str,
    *,
    batch: int | None = None,
    seq: int | None = None,
    dtype: str = "fp32",
    optimizer: str = "adamw",
    autocast: str | None = None,
    accumulate: int | None = None,
) -> Workload:
    """Return a factory workload for a target.

    Raises:
        WorkloadError: the target can't be found, imported or understood.
    """
    if target.endswith(".json"):
        config = _read_config(Path(target))
        return Workload.from_factory(
            lambda: _from_config(config, target, batch or 1, seq, dtype, optimizer, autocast, accumulate or 1)
        )
    if any(v is not None for v in (batch, seq, autocast, accumulate)):
        raise WorkloadError(
            f"target={target!r}: --batch, --seq, --autocast and --accumulate are for config.json targets; a factory sets its own"
        )
    return Workload.from_factory(_factory(target))


def _factory(target: str) -> Callable[[], Workload]:
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise WorkloadError(f"target={target!r}: expected path/file.py:factory, package.module:factory or config.json")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except WorkloadError:
        raise
    except Exception as error:
        raise WorkloadError(f"target={target!r}: importing {where} raised {type(error).__name__}: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise WorkloadError(f"target={target!r}: {where} has no callable {name!r}")
    return factory  # type: ignore[no-any-return]


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise WorkloadError(f"target: no file {path}")
    spec = importlib.util.spec_from_file_location(f"ullage_target_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkloadError(f"target={str(path)!r}: can't be read: {error}") from error
    except ValueError as error:
        raise WorkloadError(f"target={str(path)!r}: not JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config or not config.get("architectures"):
        raise WorkloadError(f"target={str(path)!r}: not a Hugging Face config: needs model_type and architectures")
    return config


def _from_config(
    raw: dict[str, Any],
    target: str,
    batch: int,
    seq: int | None,
    dtype: str,
    optimizer: str,
    autocast: str | None,
    accumulate: int,
) -> Workload:
    try:
        import transformers
    except ImportError as error:
        raise WorkloadError(f"target={target!r}: needs transformers; pip install 'ullage[hf]'") from error
    name = raw["architectures"][0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise WorkloadError(f"target={target!r}: transformers {transformers.__version__} has no {name}")
    known = {k: v for k, v in raw.items() if k not in ("architectures", "model_type", "torch_dtype", "dtype")}
    config = transformers.AutoConfig.for_model(raw["model_type"], **known)
    config.use_cache = False
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        model = cls(config).train()
    finally:
        torch.set_default_dtype(default)
    inputs = _inputs(config, name, batch, seq, DTYPES[dtype], target)
    return Workload(
        model,
        inputs,
        optimizer=OPTIMIZERS[optimizer],
        autocast=DTYPES[autocast] if autocast else None,
        accumulate=accumulate,
    )


def _inputs(config: Any, name: str, batch: int, seq: int | None, dtype: torch.dtype, target: str) -> dict[str, Any]:
    def ids(length: int) -> torch.Tensor:
        values: torch.Tensor = (torch.arange(batch * length) % (config.vocab_size - 1)).reshape(batch, length) + 1
        return values

    if hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        pixels = torch.zeros(batch, getattr(config, "num_channels", 3), size, size, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long)}
    if hasattr(config, "num_mel_bins"):
        features = torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)
        return {"input_features": features, "labels": ids(seq or config.max_target_positions)}
    if not hasattr(config, "vocab_size"):
        raise WorkloadError(f"target={target!r}: don't know the inputs of {name}; write a factory instead")
    length = seq or getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
    return {"input_ids": ids(length), "labels": ids(length)}
