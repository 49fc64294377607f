"""LoRA on a model whose weights are frozen, with the modules, names and dtypes that peft gives it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ullage._errors import WorkloadError
from ullage.workload._four_bit import Linear4bit

ALL = "all-linear"
_EXPECTED = "expected such as 'r=16', 'r=16,alpha=32,targets=all-linear' or 'r=8,targets=q_proj+v_proj'"


class Lora:
    """What `--lora` asks for; WorkloadError if that can't be read.

    Args:
        text: such as "r=16,targets=all-linear"; also alpha (default: r) and dropout (default: 0).
        base: None, or "4bit": how the frozen linear layers hold their weights.
    """

    def __init__(self, text: str, base: str | None = None) -> None:
        if base not in (None, "4bit"):
            raise WorkloadError(f"base={base!r}: expected 4bit")
        self.four_bit = base is not None
        parts = {name: value for name, _, value in (p.partition("=") for p in text.replace(" ", "").split(","))}
        unknown = sorted(set(parts) - {"r", "alpha", "dropout", "targets"})
        if unknown or "r" not in parts:
            raise WorkloadError(
                f"lora={text!r}: {f'no option {unknown[0]!r}' if unknown else 'r is missing'}; {_EXPECTED}"
            )
        try:
            self.rank, self.alpha = int(parts["r"]), float(parts.get("alpha", parts["r"]))
            self.dropout = float(parts.get("dropout", 0))
        except ValueError as error:
            raise WorkloadError(f"lora={text!r}: {error}; {_EXPECTED}") from None
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise WorkloadError(f"lora={text!r}: r must be 1 or more, and dropout below 1; {_EXPECTED}")
        self.targets = parts.get("targets", ALL).split("+")

    def put_on(self, model: nn.Module) -> nn.Module:
        """Freeze the model and put adapters on its linear layers, in place; WorkloadError if none has such a name."""
        model.requires_grad_(False)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = {n: m for n, m in model.named_modules() if _sizes(m) is not None and m is not head}
        chosen = linear if self.targets == [ALL] else {n: m for n, m in linear.items() if self._names(n)}
        if not chosen:
            known = sorted({n.rpartition(".")[2] for n in linear})
            raise WorkloadError(
                f"lora: no linear layer is named {'+'.join(self.targets)}; there are {', '.join(known)}"
            )
        for name, module in linear.items():
            parent, _, own = name.rpartition(".")
            base = packed(module) if self.four_bit else module
            setattr(model.get_submodule(parent), own, LoraLinear(base, module, self) if name in chosen else base)
        return model

    def _names(self, fqn: str) -> bool:
        return any(fqn == t or fqn.endswith(f".{t}") for t in self.targets)

    def __str__(self) -> str:
        said = f"LoRA of rank {self.rank} on {' and '.join(self.targets)}: adapters are float32, all other parameters are frozen"
        if not self.four_bit:
            return said
        return (
            f"{said}; linear layers but for the head hold theirs in 4 bits (NF4, 0.516 bytes each), unpacked by torch's ops: while one is used, that takes about "
            "twice the bytes of bitsandbytes' kernel"
        )


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """In and out features of a linear layer, also of transformers' Conv1D; None of another module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nx"):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return None


def packed(module: nn.Module) -> Linear4bit:
    """Return a linear layer with its weight in 4 bits."""
    weight: Any = module.weight
    return Linear4bit(module, weight if isinstance(module, nn.Linear) else weight.t())


class LoraLinear(nn.Module):
    """A frozen linear layer and a trained update of low rank. Adapters are float32, also where the base is not, as in peft.

    Args:
        base: the layer that is called.
        layer: the layer that it stands for, which tells the sizes.
        lora: rank, scale and dropout.
    """

    def __init__(self, base: nn.Module, layer: nn.Module, lora: Lora) -> None:
        super().__init__()
        sizes: Any = _sizes(layer)
        self.base_layer, self.scale, self.dropout = base, lora.alpha / lora.rank, lora.dropout
        self.lora_A = nn.Linear(sizes[0], lora.rank, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(lora.rank, sizes[1], bias=False, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output, in its dtype, and the update."""
        result: Tensor = self.base_layer(x)
        low = x.to(self.lora_A.weight.dtype)
        low = F.dropout(low, self.dropout, self.training) if self.dropout else low
        update: Tensor = self.lora_B(self.lora_A(low)) * self.scale
        return (result + update).to(result.dtype)
