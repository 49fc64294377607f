"""Factories: models that are cast, moved, wrapped and loaded where they are built, under fake tensors."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import ullage as ul
from _steps._idiom import ROWS, WIDTH, adamw, idiom, net, square, xs


def _factory(change: Callable[[nn.Module], nn.Module], dtype: torch.dtype = torch.float32) -> ul.Workload:
    def make() -> ul.Workload:
        model = change(net())
        return ul.Workload(model, xs().to(dtype), loss=square, optimizer=adamw(model))

    return ul.Workload.from_factory(make)


@idiom("factory")
def to_a_dtype() -> ul.Workload:
    return _factory(lambda m: m.to(torch.bfloat16), torch.bfloat16)


@idiom("factory")
def to_a_device() -> ul.Workload:
    return _factory(lambda m: m.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


@idiom("factory")
def cuda_if_there_is_one() -> ul.Workload:
    return _factory(lambda m: m.cuda() if torch.cuda.is_available() else m.cpu())


@idiom("factory")
def bfloat16() -> ul.Workload:
    return _factory(lambda m: m.bfloat16(), torch.bfloat16)


@idiom("factory")
def half() -> ul.Workload:
    return _factory(lambda m: m.half(), torch.float16)


@idiom("factory")
def half_and_back_to_float() -> ul.Workload:
    return _factory(lambda m: m.half().float())


@idiom("factory")
def double() -> ul.Workload:
    return _factory(lambda m: m.double(), torch.float64)


@idiom("factory")
def float_norms_in_a_bfloat16_model() -> ul.Workload:
    def change(model: nn.Module) -> nn.Module:
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()
                module.register_forward_pre_hook(lambda m, args: tuple(a.float() for a in args))
                module.register_forward_hook(lambda m, args, out: out.bfloat16())
        return model

    return _factory(change, torch.bfloat16)


@idiom("factory")
def channels_last() -> ul.Workload:
    def make() -> ul.Workload:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
        return ul.Workload(model, x, loss=square, optimizer=adamw(model))

    return ul.Workload.from_factory(make)


@idiom("factory")
def weight_norm_by_parametrization() -> ul.Workload:
    def change(model: nn.Module) -> nn.Module:
        for block in model.blocks:  # type: ignore[union-attr]
            nn.utils.parametrizations.weight_norm(block.up)
        return model

    return _factory(change)


@idiom("factory")
def parametrization_then_to_bfloat16() -> ul.Workload:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).transpose(-1, -2)

    def make() -> ul.Workload:
        model = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)])
        for block in model:
            nn.utils.parametrize.register_parametrization(block[0], "weight", Symmetric())  # type: ignore[index]
        model = model.to(torch.bfloat16)
        return ul.Workload(model, xs().bfloat16(), loss=square, optimizer=adamw(model))

    return ul.Workload.from_factory(make)


@idiom("factory")
def init_weights_by_apply() -> ul.Workload:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    return _factory(lambda m: m.apply(init))


@idiom("factory")
def load_state_dict_of_a_file() -> ul.Workload:
    path = Path(tempfile.mkdtemp()) / "weights.pt"
    torch.save(net(seed=3).state_dict(), path)

    def change(model: nn.Module) -> nn.Module:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model

    return _factory(change)


@idiom("factory")
def load_state_dict_of_another_model() -> ul.Workload:
    def change(model: nn.Module) -> nn.Module:
        model.load_state_dict({k: v.clone() for k, v in net(seed=3).state_dict().items()}, strict=False)
        return model

    return _factory(change)


@idiom("factory")
def load_state_dict_assign() -> ul.Workload:
    def change(model: nn.Module) -> nn.Module:
        model.load_state_dict(net(seed=3).state_dict(), assign=True)
        return model

    return _factory(change)


@idiom("factory")
def meta_device_and_to_empty() -> ul.Workload:
    def make() -> ul.Workload:
        with torch.device("meta"):
            model: nn.Module = net()
        model = model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.normal_(p, std=0.02)
        return ul.Workload(model, xs(), loss=square, optimizer=adamw(model))

    return ul.Workload.from_factory(make)


@idiom("factory")
def default_dtype_while_building() -> ul.Workload:
    def make() -> ul.Workload:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = net()
        finally:
            torch.set_default_dtype(torch.float32)
        return ul.Workload(model, xs().bfloat16(), loss=square, optimizer=adamw(model))

    return ul.Workload.from_factory(make)


class LoRA(nn.Module):
    """A frozen layer with a trained addition of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


def _with_adapters(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, LoRA):
                setattr(module, name, LoRA(child))
    return model


@idiom("factory")
def adapters_put_into_a_frozen_model() -> ul.Workload:
    return _factory(_with_adapters)


@idiom("factory")
def adapters_on_a_bfloat16_base() -> ul.Workload:
    def change(model: nn.Module) -> nn.Module:
        return _with_adapters(model.to(torch.bfloat16)).to(torch.bfloat16)

    return _factory(change, torch.bfloat16)


@idiom("factory")
def a_frozen_backbone() -> ul.Workload:
    def change(model: nn.Module) -> nn.Module:
        for p in model.blocks[:1].parameters():  # type: ignore[index,union-attr]
            p.requires_grad = False
        return model

    return _factory(change)


@idiom("factory")
def a_deep_copy_as_reference() -> ul.Workload:
    def make() -> ul.Workload:
        model = net()
        reference = copy.deepcopy(model).eval().requires_grad_(False)

        def loss(output: Tensor, batch: Tensor) -> Tensor:
            return (output - reference(batch)).square().mean() + output.square().mean()

        return ul.Workload(model, xs(), loss=loss, optimizer=adamw(model))

    return ul.Workload.from_factory(make)


@idiom("factory")
def tied_weights() -> ul.Workload:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.out = nn.Embedding(50, WIDTH), net(out=WIDTH), nn.Linear(WIDTH, 50, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.out(self.body(self.embed(ids)))
            return logits

    def make() -> ul.Workload:
        model = Tied().to("cpu")
        ids = (torch.arange(ROWS) % 50).view(4, -1)
        return ul.Workload(model, ids, loss=square, optimizer=adamw(model))

    return ul.Workload.from_factory(make)


@idiom("factory")
def from_pretrained_of_a_local_folder() -> ul.Workload:
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    folder = tempfile.mkdtemp()
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)

    def make() -> ul.Workload:
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, use_cache=False)
        model.train()
        ids = (torch.arange(64) % 60).view(2, 32)
        return ul.Workload(model, {"input_ids": ids, "labels": ids}, optimizer=adamw(model))

    return ul.Workload.from_factory(make)


@idiom("factory")
def from_pretrained_in_bfloat16() -> ul.Workload:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tempfile.mkdtemp()
    transformers.LlamaForCausalLM(config).save_pretrained(folder)

    def make() -> ul.Workload:
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_cache=False).train()
        ids = (torch.arange(64) % 60).view(2, 32)
        return ul.Workload(model, {"input_ids": ids, "labels": ids}, optimizer=adamw(model))

    return ul.Workload.from_factory(make)


@idiom("factory")
def compiled_model() -> ul.Workload:
    return _factory(lambda m: torch.compile(m, backend="eager"))  # type: ignore[arg-type,return-value]
