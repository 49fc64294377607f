"""Made-up inputs for a model of transformers, from the fields of its config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ullage._errors import WorkloadError

Inputs = dict[str, Any]
Made = Callable[[], Inputs]

DEFAULT_SEQ, LONGEST_DEFAULT = 512, 4096
ONE_SECOND = 16_000  # samples of audio
_LIMITS = ("max_position_embeddings", "n_positions", "max_target_positions")  # positions, by model type's habit


class Asked:
    """The batch that is asked for, and sentences about what was taken because nobody asked.

    Args:
        config: of transformers.
        cls: the model class.
        batch: micro-batch size.
        seq: sequence length; None: not asked for.
        dtype: of tensors that are no indices.
        target: the config's file, for messages.
    """

    def __init__(self, config: Any, cls: Any, batch: int, seq: int | None, dtype: torch.dtype, target: str) -> None:
        self.config, self.cls, self.batch, self.seq = config, cls, batch, seq
        self.dtype, self.target = dtype, target
        self.notes: list[str] = []

    def unknown(self) -> WorkloadError:
        """The error for a class whose inputs are not known."""
        return WorkloadError(
            f"target={self.target!r}: don't know the inputs of {self.cls.__name__}; write a factory instead"
        )

    def length(self, text: Any) -> int:
        """The sequence length: what is asked for, or a default, which is noted. `text`: the config that has the positions."""
        name = next((n for n in _LIMITS if isinstance(getattr(text, n, None), int) and getattr(text, n) > 0), None)
        limit = getattr(text, name) if name else None
        if self.seq is None:
            length = min(limit or DEFAULT_SEQ, LONGEST_DEFAULT)
            of = f"; the model has {limit:,} positions" if limit is not None and limit > length else ""
            self.notes.append(f"sequence length {length:,} is a default{of}: --seq (seq=) sets it")
            return length
        if limit is not None and self.seq > limit:
            raise WorkloadError(
                f"seq={self.seq}: the model has {limit} positions ({text.attribute_map.get(name, name)} in {self.target}); ask for no more, or change that number"
            )
        return self.seq


def inputs_of(a: Asked) -> Made:
    """A function that makes the batch (it is called where the model is built); errors are raised here, at once."""
    takes = inspect.signature(a.cls.forward).parameters
    if "return_loss" in takes and "pixel_values" in takes:
        return _contrastive(a)
    if "labels" not in takes and "start_positions" not in takes:
        raise WorkloadError(
            f"target={a.target!r}: {a.cls.__name__} computes no loss; in architectures name a class with a head, such as "
            f"{a.cls.__name__.removesuffix('Model')}For..., or write a factory with loss="
        )
    if a.cls.__name__.endswith("ForMultipleChoice"):
        raise a.unknown()
    if a.cls.__name__.endswith("ForCTC"):
        return _ctc(a, takes)
    if "pixel_values" in takes:
        return _images(a) if "input_ids" not in takes else _images_in_text(a, takes)
    if "input_features" in takes:
        return _speech(a)
    return _text(a, takes)


def _ids(batch: int, length: int, vocabulary: int) -> Tensor:
    return (torch.arange(batch * length) % max(vocabulary - 1, 1)).reshape(batch, length) + 1


def _text(a: Asked, takes: Any) -> Made:
    if not hasattr(a.config, "vocab_size") or "input_ids" not in takes:
        raise a.unknown()
    length, name = a.length(a.config), a.cls.__name__
    ids = functools.partial(_ids, a.batch, length, a.config.vocab_size)
    whole = name.endswith(("ForSequenceClassification", "ForNextSentencePrediction"))

    def make() -> Inputs:
        some = torch.zeros(a.batch, dtype=torch.long)
        if "start_positions" in takes:
            return {"input_ids": ids(), "start_positions": some, "end_positions": some.clone()}
        per_token = name.endswith("ForTokenClassification")
        labels = some if whole else torch.zeros(a.batch, length, dtype=torch.long) if per_token else ids()
        return {"input_ids": ids(), "labels": labels}

    return make


def _speech(a: Asked) -> Made:
    c = a.config
    if not hasattr(c, "num_mel_bins") or not hasattr(c, "max_source_positions"):
        raise a.unknown()
    length = a.length(c)

    def make() -> Inputs:
        frames = torch.zeros(a.batch, c.num_mel_bins, 2 * c.max_source_positions, dtype=a.dtype)
        return {"input_features": frames, "labels": _ids(a.batch, length, c.vocab_size)}

    return make


def _ctc(a: Asked, takes: Any) -> Made:
    """Raw audio; `seq` counts its samples. Labels: one symbol per 3,200 samples (0.2 s)."""
    if "input_values" not in takes:
        raise a.unknown()
    samples = a.seq or ONE_SECOND
    if a.seq is None:
        a.notes.append(f"{samples:,} samples of audio (1 s) are a default: --seq (seq=) sets them")
    symbols = max(samples // 3200, 1)

    def make() -> Inputs:
        labels = (torch.arange(a.batch * symbols) % max(a.config.vocab_size - 1, 1)).reshape(a.batch, symbols) + 1
        return {"input_values": torch.zeros(a.batch, samples, dtype=a.dtype), "labels": labels}

    return make


def _images(a: Asked) -> Made:
    name = a.cls.__name__
    if a.seq is not None:
        raise WorkloadError(f"seq={a.seq}: {name} takes images of image_size, so a sequence length says nothing")
    if getattr(a.config, "image_size", None) is None or not name.endswith("ForImageClassification"):
        raise a.unknown()
    shape = _shape(a, a.config)
    return lambda: {
        "pixel_values": torch.zeros(shape, dtype=a.dtype),
        "labels": torch.zeros(a.batch, dtype=torch.long),
    }


def _shape(a: Asked, vision: Any, images: int | None = None) -> tuple[int, ...]:
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return (images or a.batch, getattr(vision, "num_channels", 3), height, width)


def _contrastive(a: Asked) -> Made:
    """CLIP, SigLIP: as many texts as images; the loss compares all pairs."""
    text, vision = getattr(a.config, "text_config", None), getattr(a.config, "vision_config", None)
    if text is None or getattr(vision, "image_size", None) is None:
        raise a.unknown()
    length, shape = a.length(text), _shape(a, vision)

    def make() -> Inputs:
        pixels = torch.zeros(shape, dtype=a.dtype)
        return {
            "input_ids": _ids(a.batch, length, text.vocab_size),
            "pixel_values": pixels,
            "return_loss": True,
        }

    return make


def _images_in_text(a: Asked, takes: Any) -> Made:
    """One image per sample, its tokens at the start of the text."""
    c, text, vision = a.config, a.config.get_text_config(), getattr(a.config, "vision_config", None)
    marker = next((getattr(c, n) for n in ("image_token_id", "image_token_index") if hasattr(c, n)), None)
    if vision is None or marker is None:
        raise a.unknown()
    tokens, pictures = _grid(a, vision) if "image_grid_thw" in takes else _square(a, vision)
    lead = getattr(c, "vision_start_token_id", None)
    first = [] if lead is None else [lead]
    length = a.length(text)
    if length < tokens + len(first) + 1:
        raise WorkloadError(
            f"seq={length}: an image takes {tokens} tokens of the text in {a.cls.__name__}; ask for {tokens + len(first) + 1} or more"
        )
    a.notes.append(f"each sample has one image, which takes {tokens:,} of its {length:,} tokens")

    def make() -> Inputs:
        reserved = {marker, *first, getattr(c, "video_token_id", None), getattr(c, "vision_end_token_id", None)}
        words = [k for k in range(1, min(text.vocab_size, 4096)) if k not in reserved]
        row = [*first, *[marker] * tokens]
        row += [words[k % len(words)] for k in range(length - len(row))]
        ids = torch.tensor([row] * a.batch)
        found: Inputs = {"input_ids": ids, **pictures(), "labels": torch.where(ids == marker, -100, ids)}
        if "token_type_ids" in takes:
            found["token_type_ids"] = (ids == marker).long()
        if "image_grid_thw" in takes:  # as the model would count them, but without reading tensors one by one
            found["position_ids"] = torch.arange(length).expand(3, a.batch, length).contiguous()
        return found

    return make


def _square(a: Asked, vision: Any) -> tuple[int, Made]:
    """Tokens of an image of `image_size`, and the images."""
    if not isinstance(getattr(vision, "image_size", None), int) or not hasattr(vision, "patch_size"):
        raise a.unknown()
    patches = (vision.image_size // vision.patch_size) ** 2
    ratio = getattr(vision, "pixel_shuffle_ratio", None)
    tokens = getattr(a.config, "mm_tokens_per_image", None) or (round(patches * ratio**2) if ratio else patches)
    shape = _shape(a, vision)
    return int(tokens), lambda: {"pixel_values": torch.zeros(shape, dtype=a.dtype)}


def _grid(a: Asked, vision: Any) -> tuple[int, Made]:
    """Of Qwen's towers, which take patches of any grid: 32 x 32 patches, 448 x 448 pixels at 14 each."""
    side, merge, depth = 32, vision.spatial_merge_size, vision.temporal_patch_size
    width = getattr(vision, "in_channels", getattr(vision, "in_chans", 3)) * depth * vision.patch_size**2
    pixels = side * vision.patch_size
    a.notes.append(f"images of {pixels} x {pixels} pixels are a default: the model takes any size")

    def make() -> Inputs:
        return {
            "pixel_values": torch.zeros(a.batch * side * side, width, dtype=a.dtype),
            "image_grid_thw": torch.tensor([[1, side, side]] * a.batch),
        }

    return (side // merge) ** 2, make
