"""A workload from the `config.json` of a Hugging Face model: random weights, made-up inputs of the right shapes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ullage._errors import WorkloadError
from ullage._torch import FakeTensor
from ullage.workload._workload import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer] | None] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-4),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
    "none": None,
}
DEFAULT_SEQ = 512
_LIMITS = ("max_position_embeddings", "n_positions", "max_target_positions")  # positions, by model type's habit


def workload_from_config(
    target: str,
    batch: int,
    seq: int | None,
    dtype: str,
    optimizer: str,
    autocast: str | None,
    accumulate: int,
) -> Workload:
    """A factory workload; what can be checked without building the model is checked at once.

    Raises:
        WorkloadError: not a config, of an unknown class, or one whose inputs are not known.
    """
    raw = _read(Path(target), target)
    for option, value, known in (("dtype", dtype, DTYPES), ("optimizer", optimizer, OPTIMIZERS)):
        if value not in known:
            raise WorkloadError(f"{option}={value!r}: expected one of {', '.join(known)}")
    if autocast is not None and autocast not in DTYPES:
        raise WorkloadError(f"autocast={autocast!r}: expected one of {', '.join(DTYPES)}")
    cls, config = _classes(raw, target)
    make_inputs = _inputs(config, cls, batch, seq, DTYPES[dtype], target)

    def build() -> Workload:
        import transformers

        with _quietly(transformers), _default_dtype(DTYPES[dtype]), _weights_only_if_real():
            model = cls(config).train()
        model.tie_weights()  # for fake weights the initialization, which does this, was left out; doing it twice is no harm
        return Workload(
            model,
            make_inputs(),
            optimizer=OPTIMIZERS[optimizer],
            autocast=DTYPES[autocast] if autocast else None,
            accumulate=accumulate,
        )

    build.__name__ = f"of {target}"
    return Workload.from_factory(build)


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


def _classes(raw: dict[str, Any], target: str) -> tuple[Any, Any]:
    """The model class and the config object."""
    try:
        import transformers
    except ImportError as error:
        raise WorkloadError(f"target={target!r}: needs transformers; pip install 'ullage[hf]'") from error
    name = str(raw["architectures"][0])
    cls = getattr(transformers, name, None)
    if not inspect.isclass(cls):
        raise WorkloadError(f"target={target!r}: transformers {transformers.__version__} has no model class {name!r}")
    known = {k: v for k, v in raw.items() if k not in ("architectures", "model_type", "torch_dtype", "dtype")}
    try:
        with _quietly(transformers):
            config = transformers.AutoConfig.for_model(raw["model_type"], **known)
    except Exception as error:  # an unknown model_type, sizes that do not fit each other
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WorkloadError(f"target={target!r}: transformers does not take this config: {reason}") from error
    config.use_cache = False
    return cls, config


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


def _ids(batch: int, length: int, vocabulary: int) -> Tensor:
    return (torch.arange(batch * length) % max(vocabulary - 1, 1)).reshape(batch, length) + 1


def _inputs(
    config: Any, cls: Any, batch: int, seq: int | None, dtype: torch.dtype, target: str
) -> Callable[[], dict[str, Tensor]]:
    """A function that makes the batch (it is called where the model is built); errors are raised here, at once."""
    takes = inspect.signature(cls.forward).parameters
    questions = "start_positions" in takes
    if "labels" not in takes and not questions:
        raise WorkloadError(
            f"target={target!r}: {cls.__name__} computes no loss; in architectures name a class with a head, such as "
            f"{cls.__name__.removesuffix('Model')}For..., or write a factory with loss="
        )
    if "pixel_values" in takes and "input_ids" not in takes:
        return _images(config, cls, batch, seq, dtype, target)
    audio = "input_features" in takes
    if not hasattr(config, "vocab_size") or "pixel_values" in takes or (not audio and "input_ids" not in takes):
        raise WorkloadError(f"target={target!r}: don't know the inputs of {cls.__name__}; write a factory instead")
    length = _length(config, seq, target)
    ids = functools.partial(_ids, batch, length, config.vocab_size)
    whole = cls.__name__.endswith(("ForSequenceClassification", "ForNextSentencePrediction", "ForImageClassification"))
    if cls.__name__.endswith("ForMultipleChoice"):
        raise WorkloadError(f"target={target!r}: don't know the inputs of {cls.__name__}; write a factory instead")

    def make() -> dict[str, Tensor]:
        if audio:
            frames = torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)
            return {"input_features": frames, "labels": ids()}
        some = torch.zeros(batch, dtype=torch.long)
        if questions:
            return {"input_ids": ids(), "start_positions": some, "end_positions": some.clone()}
        per_token = cls.__name__.endswith("ForTokenClassification")
        labels = some if whole else torch.zeros(batch, length, dtype=torch.long) if per_token else ids()
        return {"input_ids": ids(), "labels": labels}

    return make


def _images(
    config: Any, cls: Any, batch: int, seq: int | None, dtype: torch.dtype, target: str
) -> Callable[[], dict[str, Tensor]]:
    if seq is not None:
        raise WorkloadError(f"seq={seq}: {cls.__name__} takes images of image_size, so a sequence length says nothing")
    size = getattr(config, "image_size", None)
    if size is None or not cls.__name__.endswith("ForImageClassification"):
        raise WorkloadError(f"target={target!r}: don't know the inputs of {cls.__name__}; write a factory instead")
    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch, getattr(config, "num_channels", 3), height, width)
    return lambda: {"pixel_values": torch.zeros(shape, dtype=dtype), "labels": torch.zeros(batch, dtype=torch.long)}


def _length(config: Any, seq: int | None, target: str) -> int:
    name = next((n for n in _LIMITS if isinstance(getattr(config, n, None), int) and getattr(config, n) > 0), None)
    limit = getattr(config, name) if name else None
    if seq is not None and limit is not None and seq > limit:
        raise WorkloadError(
            f"seq={seq}: the model has {limit} positions ({config.attribute_map.get(name, name)} in {target}); ask for no more, or change that number"
        )
    return seq or limit or DEFAULT_SEQ
