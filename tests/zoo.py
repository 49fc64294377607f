"""Small model families that tests and benchmarks share. Random weights, real inputs, nothing downloaded."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from ullage.demo import GPT


@dataclass(frozen=True)
class Case:
    """A model in train mode, one micro-batch, and a loss (None: the output has `.loss`)."""

    model: nn.Module
    batch: Any
    loss: Callable[[Any, Any], Tensor] | None = None


def text_ids(batch: int, seq: int) -> Tensor:
    text = "".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)).encode()
    return torch.tensor(list(text[: batch * seq])).view(batch, seq)


def images(batch: int, size: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:batch], dtype=torch.float32)[:, None] / 16
    return F.interpolate(x, size=(size, size)).expand(-1, 3, -1, -1).contiguous(), torch.tensor(digits.target[:batch])


def _next(logits: Any, ids: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _classes(logits: Any, batch: Any) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % 10)


def gpt() -> Case:
    return Case(GPT(layers=4, width=128, heads=4, seq=128), text_ids(4, 128), _next)


def _hf(config: str, model: str, batch: dict[str, Any], **kw: Any) -> Case:
    import transformers

    return Case(getattr(transformers, model)(getattr(transformers, config)(**kw)).train(), batch)


def _lm(config: str, model: str, seq: int = 128, **kw: Any) -> Case:
    ids = text_ids(4, seq)
    return _hf(config, model, {"input_ids": ids, "labels": ids}, vocab_size=512, use_cache=False, **kw)


_LLAMA = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


def gpt2() -> Case:
    return _lm(
        "GPT2Config",
        "GPT2LMHeadModel",
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=1,
    )


def llama() -> Case:
    return _lm("LlamaConfig", "LlamaForCausalLM", **_LLAMA)


def qwen3() -> Case:
    return _lm("Qwen3Config", "Qwen3ForCausalLM", **_LLAMA, head_dim=32)


def mixtral() -> Case:
    return _lm("MixtralConfig", "MixtralForCausalLM", **_LLAMA, num_local_experts=4, output_router_logits=True)


def bert() -> Case:
    return _lm(
        "BertConfig",
        "BertForMaskedLM",
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
    )


def t5() -> Case:
    return _lm(
        "T5Config",
        "T5ForConditionalGeneration",
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
    )


def opt() -> Case:
    return _lm(
        "OPTConfig",
        "OPTForCausalLM",
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
    )


def gemma() -> Case:
    """With gelu_pytorch_tanh, and embeddings times a number."""
    return _lm("GemmaConfig", "GemmaForCausalLM", **_LLAMA, head_dim=32)


def phi() -> Case:
    """With gelu_new, whose numbers autograd saves."""
    return _lm(
        "PhiConfig",
        "PhiForCausalLM",
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
    )


def albert() -> Case:
    """One layer, called four times."""
    return _lm(
        "AlbertConfig",
        "AlbertForMaskedLM",
        embedding_size=64,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
    )


def vit() -> Case:
    x, y = images(8, 64)
    kw = dict(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=64,
        patch_size=8,
        num_labels=10,
    )
    return _hf("ViTConfig", "ViTForImageClassification", {"pixel_values": x, "labels": y}, **kw)


def clip() -> Case:
    x, _ = images(8, 64)
    tower = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
    text, vision = dict(**tower, vocab_size=512, max_position_embeddings=64), dict(**tower, image_size=64, patch_size=8)
    batch = {"input_ids": text_ids(8, 32), "pixel_values": x, "return_loss": True}
    return _hf("CLIPConfig", "CLIPModel", batch, text_config=text, vision_config=vision, projection_dim=64)


def whisper() -> Case:
    kw = dict(
        d_model=128,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
    )
    kw |= dict(
        decoder_ffn_dim=512,
        max_source_positions=128,
        max_target_positions=64,
        num_mel_bins=40,
        pad_token_id=0,
        use_cache=False,
    )
    kw |= dict(decoder_start_token_id=1, bos_token_id=1, eos_token_id=2, vocab_size=512)
    features = torch.linspace(-1, 1, 4 * 40 * 256).view(4, 40, 256)
    return _hf(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {"input_features": features, "labels": text_ids(4, 32)},
        **kw,
    )


def mamba() -> Case:
    return _lm("MambaConfig", "MambaForCausalLM", seq=24, hidden_size=64, num_hidden_layers=3, state_size=8)


class ResBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.down = (
            nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)) if a != b else nn.Identity()
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.down(x))


def resnet() -> Case:
    widths = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    stem = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    blocks = nn.Sequential(*(ResBlock(*w) for w in widths))
    model = nn.Sequential(nn.Sequential(*stem), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return Case(model, images(16, 32)[0], _classes)


class ConvBlock(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, b), nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.dropout(F.silu(self.norm2(h)), 0.1, self.training)) + self.skip(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.ModuleList([ConvBlock(32, 32), ConvBlock(32, 64), ConvBlock(64, 64)])
        self.mid = ConvBlock(64, 64)
        self.up = nn.ModuleList([ConvBlock(128, 64), ConvBlock(128, 32), ConvBlock(64, 32)])
        self.out = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, skips = self.inp(x), []
        for d in self.down:
            h = d(h)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.mid(h)
        for u in self.up:
            h = u(torch.cat([F.interpolate(h, scale_factor=2.0), skips.pop()], 1))
        return self.out(h)


def unet() -> Case:
    return Case(UNet(), images(8, 32)[0], lambda out, x: F.mse_loss(out, x))


class Denoiser(nn.Module):
    """A U-Net of diffusers, with time embeddings and attention to a text, asked for the noise in images at random times."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.text = nn.Embedding(256, 64)
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=4,
            norm_num_groups=8,
        )

    def forward(self, noisy: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noisy, times, self.text(ids)).sample


def diffusion() -> Case:
    x, noise, times = images(4, 16)[0], torch.randn(4, 3, 16, 16), torch.tensor([10, 200, 500, 900])
    share = (times / 1000).view(4, 1, 1, 1)
    batch = {"noisy": (1 - share).sqrt() * x + share.sqrt() * noise, "times": times, "ids": text_ids(4, 16)}
    return Case(Denoiser(), batch, lambda out, _: F.mse_loss(out, noise))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = (
            nn.Embedding(256, 64),
            nn.LSTM(64, 128, 2, dropout=0.1, batch_first=True),
            nn.Linear(128, 256),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


def lstm() -> Case:
    return Case(LSTM(), text_ids(8, 64), _next)


class MoEBlock(nn.Module):
    def __init__(self, width: int = 64, experts: int = 4) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width), nn.Dropout(0.1))
            for _ in range(experts)
        )
        self.register_buffer("load", torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weight, index = self.router(h).softmax(-1).topk(2, -1)
        gate = weight.new_zeros(*h.shape[:-1], len(self.experts)).scatter(-1, index, weight)
        self.load += F.one_hot(index, len(self.experts)).sum((0, 1, 2))
        return x + sum(e(h) * gate[..., i : i + 1] for i, e in enumerate(self.experts))


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Embedding(256, 64),
            nn.ModuleList(MoEBlock() for _ in range(3)),
            nn.Linear(64, 256),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for b in self.blocks:
            x = b(x)
        return self.head(x)


def moe() -> Case:
    return Case(MoE(), text_ids(4, 128), _next)


class Shared(nn.Module):
    """One block called four times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = GPT(layers=1, width=128, heads=4, seq=128)

    def forward(self, ids: Tensor) -> Tensor:
        g = self.inner
        x = g.embed(ids)
        for _ in range(4):
            x = g.blocks[0](x)
        return g.head(g.norm(x))


def shared() -> Case:
    return Case(Shared(), text_ids(4, 128), _next)


def lora() -> Case:
    model = GPT(layers=4, width=128, heads=4, seq=128)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or "blocks.3" in name)
    return Case(model, text_ids(4, 128), _next)


FAMILIES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        gpt,
        gpt2,
        llama,
        qwen3,
        mixtral,
        bert,
        t5,
        vit,
        clip,
        whisper,
        mamba,
        resnet,
        unet,
        lstm,
        moe,
        shared,
        lora,
    )
}

# of which promises are judged in `benchmarks/promise.py`, and no more
MORE_FAMILIES: dict[str, Callable[[], Case]] = {f.__name__: f for f in (opt, gemma, phi, albert, diffusion)}


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def workload(name: str, autocast: torch.dtype | None = None, accumulate: int = 1) -> ul.Workload:
    """A family's workload under a fixed seed."""
    torch.manual_seed(0)
    case = {**FAMILIES, **MORE_FAMILIES}[name]()
    return ul.Workload(
        case.model, case.batch, loss=case.loss, optimizer=adamw, autocast=autocast, accumulate=accumulate
    )
