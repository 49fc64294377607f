"""A workload from the `config.json` of a Hugging Face model: random weights, made-up inputs of the right shapes."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ullage._errors import WorkloadError
from ullage._torch import FakeTensor
from ullage.workload._workload import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ALSO = {
    "fp32": ("float32", "float", "f32"),
    "bf16": ("bfloat16",),
    "fp16": ("float16", "half", "f16"),
}
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "zamba2", "bamba", "nemotron_h", "granitemoehybrid")


def dtype_named(option: str, text: str) -> torch.dtype:
    """The dtype that a text means: "bf16", "bfloat16" and "torch.bfloat16" are one; WorkloadError if it means none."""
    plain = str(text).lower().removeprefix("torch.")
    for name, dtype in DTYPES.items():
        if plain == name or plain in _ALSO[name]:
            return dtype
    raise WorkloadError(f"{option}={text!r}: expected one of {', '.join(DTYPES)}")


def workload_from_config(
    target: str,
    batch: int | None,
    seq: int | None,
    dtype: str | None,
    optimizer: str | None,
    autocast: str | None,
    accumulate: int | None,
    lora: str | None = None,
    base: str | None = None,
) -> Workload:
    """A factory workload; what can be checked without building the model is checked at once.

    Its `notes` name the defaults that were taken, and the fields of the config that are not heeded.

    Raises:
        WorkloadError: not a config, of an unknown class, or one whose inputs are not known.
    """
    from ullage.workload._inputs import Asked, inputs_of
    from ullage.workload._lora import Lora
    from ullage.workload._optimizers import OPTIMIZERS

    raw = _read(Path(target), target)
    name = optimizer or "adamw"
    if name not in OPTIMIZERS:
        raise WorkloadError(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    kind, notes = _dtype(raw, dtype)
    computed = dtype_named("autocast", autocast) if autocast is not None else None
    if base is not None and lora is None:
        raise WorkloadError(f"base={base!r}: weights in 4 bits don't train; give --lora (lora=) too")
    adapters = Lora(lora, base) if lora is not None else None
    cls, config, said = _classes(raw, target)
    asked = Asked(config, cls, batch or 1, seq, kind, target)
    make_inputs, make_optimizer = inputs_of(asked), OPTIMIZERS[name]
    notes += [*asked.notes, *said]
    if batch is None:
        notes.insert(0, "batch 1 is a default: --batch (batch=) sets it")
    if optimizer is None:
        notes.append("optimizer adamw is a default: --optimizer (optimizer=) sets it")
    if adapters is not None:
        notes.append(str(adapters))

    def build() -> Workload:
        import transformers

        with _quietly(transformers), _default_dtype(kind), _weights_only_if_real():
            model = cls(config).train()
        model.tie_weights()  # for fake weights the initialization, which does this, was left out; doing it twice is no harm
        if adapters is not None:
            adapters.put_on(model)
        made = make_optimizer(model) if make_optimizer is not None else None
        return Workload(model, make_inputs(), optimizer=made, autocast=computed, accumulate=accumulate or 1)

    build.__name__ = f"of {target}"
    return replace(Workload.from_factory(build), notes=tuple(notes))


def _dtype(raw: dict[str, Any], asked: str | None) -> tuple[torch.dtype, list[str]]:
    """The parameters' dtype, the config's own unless another is asked for, and sentences about it."""
    own, quantization = raw.get("dtype") or raw.get("torch_dtype"), raw.get("quantization_config")
    notes = []
    if isinstance(quantization, dict):
        how = quantization.get("quant_method", "unknown")
        notes.append(f"the config's quantization ({how}) is left out: all weights have the parameters' dtype")
    if asked is not None:
        kind = dtype_named("dtype", asked)
    elif own is not None and str(own) != "auto":
        kind = dtype_named("the config's dtype", str(own))
        notes.append(
            f"parameters are {str(kind).removeprefix('torch.')}, as the config says: --dtype (dtype=) sets another"
        )
    else:
        kind = torch.float32
        notes.append("parameters in float32 are a default: --dtype (dtype=) sets it")
    return kind, notes


def _read(path: Path, target: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkloadError(f"target={target!r}: can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise WorkloadError(f"target={target!r}: not JSON: {error}") from error
    if isinstance(config, dict) and "decisions" in config:
        raise WorkloadError(f"target={target!r}: this is a plan; give it as --plan, and the model it is for as TARGET")
    if not isinstance(config, dict) or "model_type" not in config or not config.get("architectures"):
        raise WorkloadError(f"target={target!r}: not a Hugging Face config: needs model_type and architectures")
    return config


def _classes(raw: dict[str, Any], target: str) -> tuple[Any, Any, list[str]]:
    """The model class, the config object, and sentences about fields that were changed."""
    try:
        import transformers
    except ImportError as error:
        raise WorkloadError(f"target={target!r}: needs transformers; pip install 'ullage[hf]'") from error
    name = str(raw["architectures"][0])
    cls = getattr(transformers, name, None)
    if not inspect.isclass(cls):
        raise WorkloadError(f"target={target!r}: transformers {transformers.__version__} has no model class {name!r}")
    left = ("architectures", "model_type", "torch_dtype", "dtype", "quantization_config")
    known = {k: v for k, v in raw.items() if k not in left}
    try:
        with _quietly(transformers):
            config = transformers.AutoConfig.for_model(raw["model_type"], **known)
    except Exception as error:  # an unknown model_type, sizes that do not fit each other
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WorkloadError(f"target={target!r}: transformers does not take this config: {reason}") from error
    notes = []
    if raw.get("use_cache"):
        notes.append("use_cache is switched off: training needs no key-value cache")
    if raw["model_type"] in _MAMBA and importlib.util.find_spec("mamba_ssm") is None:
        notes.append(
            "Mamba's slow path is planned, plain ops of transformers, because mamba_ssm is not installed here: its fused kernels "
            "save fewer bytes and take less time"
        )
    for part in (config, config.get_text_config()):
        part.use_cache = False
    return cls, config, notes


@contextlib.contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Silence transformers' warnings: they are advice about loading checkpoints, and none is loaded."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _weights_only_if_real() -> Iterator[None]:
    """Fake parameters need no random values, and drawing them can ask for values (trunc_normal_ does)."""
    from transformers.initialization import no_init_weights

    with no_init_weights() if isinstance(torch.empty(0), FakeTensor) else contextlib.nullcontext():
        yield
