"""Config targets: inputs from the config's own fields, named defaults, optimizers, LoRA; and names of devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ullage as ul
from ullage.cost import device_name
from ullage.workload import load_target
from ullage.workload._four_bit import Linear4bit
from ullage.workload._optimizers import OPTIMIZERS

_TEXT: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
)
_VISION: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
_VISION |= dict(image_size=32, patch_size=8)
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_TEXT}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": dict(
        architectures=["CLIPModel"],
        text_config=dict(**_TEXT, max_position_embeddings=16, eos_token_id=98),
        vision_config=_VISION,
    ),
    "siglip": dict(
        architectures=["SiglipModel"], text_config=dict(**_TEXT, max_position_embeddings=16), vision_config=_VISION
    ),
    "gemma3": dict(
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=dict(**_TEXT, num_key_value_heads=1, head_dim=16),
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    ),
    "llama4": dict(
        architectures=["Llama4ForConditionalGeneration"],
        text_config=dict(**_TEXT, num_key_value_heads=1, head_dim=16, intermediate_size_mlp=64, num_local_experts=2),
        vision_config=dict(
            **{**_VISION, "intermediate_size": 128},
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
            pixel_shuffle_ratio=0.5,
        ),
        image_token_index=90,
    ),
    "qwen2_vl": dict(
        architectures=["Qwen2VLForConditionalGeneration"],
        text_config=dict(
            **_TEXT,
            num_key_value_heads=1,
            rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4),
        ),
        vision_config=dict(depth=1, embed_dim=32, num_heads=2, hidden_size=32, mlp_ratio=2, patch_size=4),
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    ),
    "wav2vec2": dict(
        architectures=["Wav2Vec2ForCTC"],
        **{**_TEXT, "vocab_size": 16},
        conv_dim=[32, 32],
        conv_stride=[5, 4],
        conv_kernel=[10, 8],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
    ),
}


def _written(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    "kind", [k if k in ("siglip", "gemma3") else pytest.param(k, marks=pytest.mark.slow) for k in CONFIGS]
)
def test_inputs_are_made_from_the_config(kind: str, tmp_path: Path) -> None:
    target = _written(tmp_path, {"model_type": kind, **CONFIGS[kind]})
    seq = {"qwen2_vl": 300, "wav2vec2": 3200, "clip": None, "siglip": None}.get(kind, 40)
    work = load_target(target, batch=2, seq=seq, optimizer="sgd")
    predicted = ul.profile(work, costs="roofline")
    assert predicted.peak_bytes == ul.measure(work, steps=1).peak_bytes


STATE = {
    "adamw": 8,
    "adamw-fused": 8,
    "adamw-foreach": 8,
    "adamw-forloop": 8,
    "adamw-8bit": 2 + 8 / 256,
    "adamw-master": 8,
    "lion": 4,
    "sgd": 0,
    "sgd-momentum": 4,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_predicted_to_the_byte(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(100, 200, bias=False), torch.nn.GELU(), torch.nn.Linear(200, 100, bias=False)
    )
    make = OPTIMIZERS[name]
    optimizer = make(model) if make is not None else None
    work = ul.Workload(model, torch.ones(4, 100), loss=lambda y, x: y.pow(2).mean(), optimizer=optimizer)
    predicted = ul.profile(work, costs="roofline")
    assert predicted.peak_bytes == ul.measure(work, steps=1).peak_bytes
    if name in STATE:
        elements, one_each = 2 * 20_000, predicted.by_category.get("optimizer state", 0) - STATE[name] * 2 * 20_000
        assert 0 <= one_each <= 0.001 * elements  # step counters, and a block that is not whole


@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-master"])
def test_own_optimizers_go_where_adamw_goes(name: str) -> None:
    ends = []
    for kind in ("adamw", name):
        torch.manual_seed(1)
        model = torch.nn.Linear(100, 99)
        optimizer: Any = OPTIMIZERS[kind](model)  # type: ignore[misc]
        x = torch.randn(8, 100)
        for _ in range(5):
            model(x).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.weight.detach())
    assert (ends[0] - ends[1]).abs().max() <= (5e-4 if name == "adamw-8bit" else 1e-6)


def test_defaults_are_named(tmp_path: Path) -> None:
    of = {"max_position_embeddings": 131_072, "torch_dtype": "bfloat16", "use_cache": True}
    work = load_target(_written(tmp_path, {**_LLAMA, **of, "quantization_config": {"quant_method": "gptq"}}))
    assert work.notes == (
        "batch 1 is a default: --batch (batch=) sets it",
        "the config's quantization (gptq) is left out: all weights have the parameters' dtype",
        "parameters are bfloat16, as the config says: --dtype (dtype=) sets another",
        "sequence length 4,096 is a default; the model has 131,072 positions: --seq (seq=) sets it",
        "use_cache is switched off: training needs no key-value cache",
        "optimizer adamw is a default: --optimizer (optimizer=) sets it",
    )
    built = work.build()
    assert next(built.model.parameters()).dtype == torch.bfloat16 and built.batch["input_ids"].shape == (1, 4096)
    asked = load_target(_written(tmp_path, _LLAMA), batch=1, seq=8, dtype="torch.float16", optimizer="sgd")
    assert asked.notes == ()


@pytest.mark.parametrize("text", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_dtypes_have_many_names(text: str, tmp_path: Path) -> None:
    built = load_target(_written(tmp_path, _LLAMA), seq=8, dtype=text, autocast=text).build()
    assert next(built.model.parameters()).dtype == built.autocast == torch.bfloat16


def test_lora_trains_the_adapters_alone(tmp_path: Path) -> None:
    target = _written(tmp_path, _LLAMA)
    work = load_target(target, seq=8, dtype="bf16", lora="r=4,targets=q_proj+v_proj").build()
    trained = [n for n, p in work.model.named_parameters() if p.requires_grad]
    assert trained == [f"model.layers.0.self_attn.{of}_proj.lora_{x}.weight" for of in ("q", "v") for x in ("A", "B")]
    assert {p.dtype for p in work.model.parameters() if p.requires_grad} == {torch.float32}
    everywhere = load_target(target, seq=8, lora="r=4,targets=all-linear").build()
    assert sum(p.requires_grad for p in everywhere.model.parameters()) == 2 * 7  # not the head
    predicted = ul.profile(load_target(target, seq=8, lora="r=4"), costs="roofline")
    assert predicted.peak_bytes == ul.measure(load_target(target, seq=8, lora="r=4"), steps=1).peak_bytes
    for text, match in (
        ("16", "no option '16'"),
        ("alpha=2", "r is missing"),
        ("r=4,rank=2", "no option 'rank'"),
        ("r=0", "r must be 1"),
        ("r=x", "invalid"),
    ):
        with pytest.raises(ul.WorkloadError, match=match):
            load_target(target, lora=text)
    with pytest.raises(ul.WorkloadError, match="no linear layer is named c_attn; there are down_proj, gate_proj"):
        load_target(target, seq=8, lora="r=4,targets=c_attn").build()


def test_devices_have_short_names() -> None:
    for said, meant in {
        "h100": "h100-80gb",
        "H100": "h100-80gb",
        "a100": "a100-80gb",
        "NVIDIA A100 40GB": "a100-40gb",
        "rtx4090": "rtx-4090-24gb",
        "5090": "rtx-5090-32gb",
        "RTX_3090": "rtx-3090-24gb",
        "l4": "l4-24gb",
        "b200": "b200",
        "mi300x": "mi300x",
        "A10G": "a10g-24gb",
    }.items():
        assert device_name(said) == meant
    for said in ("80gb", "rtx", "h20", "", "a1"):
        with pytest.raises(ul.DeviceError, match="not in the table"):
            device_name(said)


def test_the_device_table_cuts_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    from ullage_cli._main import run

    assert run(["devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in ul.devices())
    assert max(map(len, lines)) <= 80
    assert lines[0] == "name               memory   bandwidth      bf16, dense  margin"
    assert "b200           178.81 GiB  8,000 GB/s  2,250.0 TFLOP/s      8%" in lines


def test_a_base_in_four_bits(tmp_path: Path) -> None:
    """Predicted to the byte; each frozen weight takes 0.516 bytes; gradients are those of the unpacked weights."""
    target = _written(tmp_path, _LLAMA)
    work = load_target(target, seq=8, lora="r=4,targets=q_proj", base="4bit")
    assert "linear layers but for the head hold theirs in 4 bits (NF4, 0.516 bytes each)" in work.notes[-1]
    inst = work.build()
    layers = {n: m for n, m in inst.model.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 7 and all(m.weight.dtype == torch.uint8 for m in layers.values())
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert ul.verify(inst, plan).ok
    assert ul.measure(inst, plan, steps=1).peak_bytes == plan.predicted.peak_bytes
    for options, match in (({"base": "4bit"}, "give --lora"), ({"base": "8bit", "lora": "r=4"}, "expected 4bit")):
        with pytest.raises(ul.WorkloadError, match=match):
            load_target(target, **options)


@pytest.mark.parametrize("shape", [(64, 32), (48, 100), (3, 5)])
def test_four_bits_hold_a_normal_weight_to_a_tenth(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    packed = Linear4bit(layer, layer.weight)
    weight = packed.dense(torch.float32)
    assert weight.shape == layer.weight.shape and (weight - layer.weight).norm() < 0.12 * layer.weight.norm()
    x = torch.randn(7, shape[1], requires_grad=True)
    wanted = torch.autograd.grad(F.linear(x, weight, layer.bias).square().sum(), x)
    assert torch.equal(torch.autograd.grad(packed(x).square().sum(), x)[0], wanted[0])


def test_four_bits_at_scale() -> None:
    """2 ** 20 weights: half a byte each, 1 / 64 for the scales and 4 / (64 * 256) for their steps, and 68 bytes."""
    layer = nn.Linear(1024, 1024, bias=False)
    held = Linear4bit(layer, layer.weight)
    assert sum(t.numel() * t.element_size() for t in (*held.parameters(), *held.buffers())) == 2**19 + 2**14 + 2**8 + 68
