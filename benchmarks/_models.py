"""Models that `frontier.py` trains: families of the test zoo at sizes where a step takes a third of a second or more.

Random weights, float32, AdamW; text is the English that ships with CPython, images are scikit-learn's digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tests.zoo import Case, ConvBlock, ResBlock, UNet, _classes, _hf, _next, adamw, images, text_ids
from torch import Tensor, nn
from torch.nn import functional as F

import ullage as ul
from ullage.demo import GPT


@dataclass(frozen=True)
class Model:
    """A model and where its blocks are.

    `blocks` are the containers of blocks (or single blocks), in forward order, that a user would checkpoint by hand;
    `chains` are those of them whose blocks are called one after another, each on the one tensor its predecessor returned.
    """

    build: Callable[[], Case]
    blocks: tuple[str, ...]
    chains: tuple[str, ...] = ()
    not_a_chain: str = ""


def _gpt(layers: int, width: int, heads: int, batch: int, seq: int, vocab: int = 256) -> Case:
    model = GPT(layers=layers, width=width, heads=heads, seq=seq, dropout=0.0)
    if vocab != 256:  # ids stay bytes; embedding and head are as large as those of a real tokenizer
        model.embed, model.head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        nn.init.normal_(model.embed.weight, std=0.02)
        model.head.weight = model.embed.weight
    return Case(model, text_ids(batch, seq), _next)


def _hf_lm(config: str, model: str, batch: int, seq: int, **kw: Any) -> Case:
    ids = text_ids(batch, seq)
    return _hf(config, model, {"input_ids": ids, "labels": ids}, use_cache=False, **kw)


_DECODER = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}


def _vit() -> Case:
    x, y = images(32, 64)
    kw: dict[str, Any] = {
        "hidden_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "intermediate_size": 768,
    }
    kw |= {"image_size": 64, "patch_size": 8, "num_labels": 10}
    return _hf("ViTConfig", "ViTForImageClassification", {"pixel_values": x, "labels": y}, **kw)


def _whisper() -> Case:
    kw: dict[str, Any] = {
        "d_model": 192,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "vocab_size": 4096,
        "use_cache": False,
    }
    kw |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 768, "decoder_ffn_dim": 768}
    kw |= {"max_source_positions": 256, "max_target_positions": 64, "num_mel_bins": 80}
    kw |= {"pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
    time, mel = torch.linspace(0, 60, 512), torch.linspace(0.2, 4, 80)
    features = torch.sin(mel[:, None] * time).expand(4, -1, -1).contiguous()  # tones; no speech ships with anything
    batch = {"input_features": features, "labels": text_ids(4, 64)}
    return _hf("WhisperConfig", "WhisperForConditionalGeneration", batch, **kw)


def _resnet() -> Case:
    widths = [(48, 48, 1)] * 3 + [(48, 96, 2)] + [(96, 96, 1)] * 3 + [(96, 192, 2)] + [(192, 192, 1)] * 3
    stem = nn.Sequential(nn.Conv2d(3, 48, 3, 1, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(inplace=True))
    blocks = nn.Sequential(*(ResBlock(*w) for w in widths))
    model = nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10))
    return Case(model, images(32, 32)[0], _classes)


def _mse(out: Any, x: Any) -> Tensor:
    return F.mse_loss(out, x)


def _unet() -> Case:
    model = UNet()
    model.inp, model.out = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)
    model.down = nn.ModuleList([ConvBlock(64, 64), ConvBlock(64, 128), ConvBlock(128, 128)])
    model.mid = ConvBlock(128, 128)
    model.up = nn.ModuleList([ConvBlock(256, 128), ConvBlock(256, 64), ConvBlock(128, 64)])
    return Case(model, images(16, 32)[0], _mse)


MODELS: dict[str, Model] = {
    "gpt-many-blocks": Model(lambda: _gpt(48, 64, 4, batch=8, seq=96), ("blocks",), ("blocks",)),
    "gpt-long": Model(lambda: _gpt(6, 256, 4, batch=1, seq=1536), ("blocks",), ("blocks",)),
    "gpt-vocabulary": Model(lambda: _gpt(4, 256, 4, batch=2, seq=256, vocab=32_000), ("blocks",), ("blocks",)),
    "llama": Model(
        lambda: _hf_lm("LlamaConfig", "LlamaForCausalLM", 4, 256, num_hidden_layers=8, **_DECODER),
        ("model.layers",),
        ("model.layers",),
    ),
    "mixtral": Model(
        lambda: _hf_lm(
            "MixtralConfig",
            "MixtralForCausalLM",
            4,
            192,
            num_hidden_layers=6,
            num_local_experts=4,
            output_router_logits=True,
            **_DECODER,
        ),
        ("model.layers",),
        ("model.layers",),
    ),
    "vit": Model(_vit, ("vit.layers",), ("vit.layers",)),
    "whisper": Model(
        _whisper,
        ("model.encoder.layers", "model.decoder.layers"),
        ("model.encoder.layers", "model.decoder.layers"),
    ),
    "resnet": Model(_resnet, ("1",), ("1",)),
    "unet": Model(
        _unet, ("down", "mid", "up"), not_a_chain="skip connections join blocks far apart; no block feeds only the next"
    ),
}
QUICK = ("vit", "unet")


def workload(name: str) -> ul.Workload:
    """A model's workload under a fixed seed."""
    torch.manual_seed(0)
    case = MODELS[name].build()
    return ul.Workload(case.model, case.batch, loss=case.loss, optimizer=adamw)


def blocks_of(model: nn.Module, facts: Model) -> list[nn.Module]:
    """The blocks, in forward order."""
    found: list[nn.Module] = []
    for name in facts.blocks:
        module = model.get_submodule(name)
        found += list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else [module]
    return found
