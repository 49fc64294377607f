"""`determinism_check="values"` refuses none of torch's layers, and gives what the plain step gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import ullage
from tests.runtime.steps import bits, rng, seed

Made = Callable[[torch.dtype], Any]


def x(*shape: int) -> Made:
    return lambda dtype: torch.randn(*shape).to(dtype).requires_grad_()


def p(*shape: int) -> Made:
    """Between 0 and 1."""
    return lambda dtype: (torch.rand(*shape) * 0.8 + 0.1).to(dtype)


def q(*shape: int) -> Made:
    """The same, with a gradient."""
    return lambda dtype: (torch.rand(*shape) * 0.8 + 0.1).to(dtype).requires_grad_()


def i(high: int, *shape: int) -> Made:
    return lambda dtype: torch.randint(high, shape)


def sign(*shape: int) -> Made:
    return lambda dtype: (torch.randint(2, shape) * 2 - 1).to(dtype)


class Calls(nn.Module):
    """A layer among ops, and what of its result can have a gradient."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, *args: Any) -> Tensor:
        # each argument is the output of an op, and so is what comes last
        given = [a * 1 if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        out = self.layer(*given) if self.run is None else self.run(self.layer, *given)
        leaves = torch.utils._pytree.tree_leaves(out)
        floats = [t.float() for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
        return sum((t.sin().sum() for t in floats), torch.zeros(()))


_ACTIVATIONS = [
    "CELU",
    "ELU",
    "GELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "AlphaDropout",
    "Dropout",
    "Identity",
    "Flatten",
]
Case = tuple[tuple[Any, ...], dict[str, Any], list[Made]]


def _by_size() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for n in (1, 2, 3):
        side = (6,) * n
        image = [x(2, 4, *side)]
        for name in ("AdaptiveAvgPool", "AdaptiveMaxPool"):
            found[f"{name}{n}d"] = (3,), {}, image
        for name in ("AvgPool", "MaxPool"):
            found[f"{name}{n}d"] = (2,), {}, image
        found[f"LPPool{n}d"] = (2, 2), {}, [q(2, 4, *side)]
        for name in ("CircularPad", "ReflectionPad", "ReplicationPad", "ZeroPad"):
            found[f"{name}{n}d"] = (1,), {}, image
        found[f"ConstantPad{n}d"] = (1, 0.5), {}, image
        for name in ("Conv", "ConvTranspose"):
            found[f"{name}{n}d"] = (4, 6, 3), {}, image
        found[f"BatchNorm{n}d"] = (4,), {}, image
        found[f"InstanceNorm{n}d"] = (4,), {"affine": True, "track_running_stats": True}, image
        found[f"Dropout{n}d"] = (0.5,), {}, image
    for n in (2, 3):
        found[f"FractionalMaxPool{n}d"] = (2,), {"output_size": 3}, [x(2, 4, *(6,) * n)]
    return found


_ROWS = [x(4, 6)]
_IMAGE = [x(2, 4, 6, 6)]
_SEQUENCE = [x(2, 5, 8)]
CASES: dict[str, Case] = {
    **{name: ((), {}, _ROWS) for name in _ACTIVATIONS},
    **_by_size(),
    "FeatureAlphaDropout": ((), {}, _IMAGE),
    "GLU": ((), {}, _ROWS),
    "Threshold": ((0.1, 2.0), {}, _ROWS),
    **{name: ((1,), {}, _ROWS) for name in ("Softmax", "Softmin", "LogSoftmax")},
    "Softmax2d": ((), {}, _IMAGE),
    "ChannelShuffle": ((2,), {}, _IMAGE),
    "PixelShuffle": ((2,), {}, _IMAGE),
    "PixelUnshuffle": ((2,), {}, _IMAGE),
    "Fold": (((4, 4), 2), {}, [x(2, 8, 9)]),
    "Unfold": ((2,), {}, _IMAGE),
    "Unflatten": ((1, (2, 3)), {}, _ROWS),
    "CrossMapLRN2d": ((2,), {}, _IMAGE),
    "LocalResponseNorm": ((2,), {}, _IMAGE),
    "GroupNorm": ((2, 4), {}, _IMAGE),
    "LayerNorm": ((6,), {}, _ROWS),
    "RMSNorm": ((6,), {}, _ROWS),
    "Linear": ((6, 4), {}, _ROWS),
    "Bilinear": ((6, 6, 4), {}, [x(4, 6), x(4, 6)]),
    "Embedding": ((9, 4), {}, [i(9, 3, 2)]),
    "EmbeddingBag": ((9, 4), {}, [i(9, 3, 2)]),
    "Upsample": ((), {"scale_factor": 2, "mode": "bicubic"}, _IMAGE),
    "UpsamplingBilinear2d": ((), {"scale_factor": 2}, _IMAGE),
    "UpsamplingNearest2d": ((), {"scale_factor": 2}, _IMAGE),
    **{name: ((8, 6), {"batch_first": True, "bidirectional": True, "num_layers": 2, "dropout": 0.2}, _SEQUENCE) for name in ("RNN", "LSTM", "GRU")},
    **{name: ((6, 8), {}, _ROWS) for name in ("RNNCell", "LSTMCell", "GRUCell")},
    "MultiheadAttention": ((8, 2), {"dropout": 0.2, "batch_first": True}, [x(2, 5, 8)] * 3),
    "TransformerEncoderLayer": ((8, 2, 16), {"batch_first": True}, _SEQUENCE),
    "TransformerDecoderLayer": ((8, 2, 16), {"batch_first": True}, [x(2, 5, 8)] * 2),
    "Transformer": ((8, 2, 1, 1, 16), {"batch_first": True}, [x(2, 5, 8)] * 2),
    "AdaptiveLogSoftmaxWithLoss": ((6, 8, [4]), {}, [x(4, 6), i(8, 4)]),
    "BCELoss": ((), {}, [q(4, 6), p(4, 6)]),
    **{name: ((), {}, [x(4, 6), p(4, 6)]) for name in ("BCEWithLogitsLoss", "MSELoss", "L1Loss", "HuberLoss", "SmoothL1Loss", "PoissonNLLLoss")},
    "KLDivLoss": ((), {"reduction": "batchmean"}, [x(4, 6), p(4, 6)]),
    "CosineEmbeddingLoss": ((), {}, [x(4, 6), x(4, 6), sign(4)]),
    "CosineSimilarity": ((), {}, [x(4, 6), x(4, 6)]),
    "PairwiseDistance": ((), {}, [x(4, 6), x(4, 6)]),
    **{name: ((), {}, [x(4, 6), i(6, 4)]) for name in ("CrossEntropyLoss", "MultiMarginLoss", "NLLLoss")},
    "NLLLoss2d": ((), {}, [x(2, 4, 6, 6), i(4, 2, 6, 6)]),
    "GaussianNLLLoss": ((), {}, [x(4, 6), p(4, 6), q(4, 6)]),
    **{name: ((), {}, [x(4, 6), sign(4, 6)]) for name in ("HingeEmbeddingLoss", "SoftMarginLoss")},
    "MarginRankingLoss": ((), {}, [x(4), x(4), sign(4)]),
    "MultiLabelMarginLoss": ((), {}, [x(4, 6), i(6, 4, 6)]),
    "MultiLabelSoftMarginLoss": ((), {}, [x(4, 6), p(4, 6)]),
    **{name: ((), {}, [x(4, 6)] * 3) for name in ("TripletMarginLoss", "TripletMarginWithDistanceLoss")},
}  # fmt: skip
LAZY = {f"Lazy{k}": f"{k}" for k in [*(f"{name}{n}d" for name in ("BatchNorm", "InstanceNorm", "Conv", "ConvTranspose") for n in (1, 2, 3)), "Linear"]}  # fmt: skip
for lazy, eager in LAZY.items():
    arguments, options, given = CASES[eager]
    CASES[lazy] = arguments[1:], options, given
OTHERS: dict[str, Callable[[], tuple[nn.Module, Callable[..., Any] | None, list[Made]]]] = {
    "CTCLoss": lambda: (nn.CTCLoss(), lambda m, h: m(h.log_softmax(-1), torch.ones(2, 2, dtype=torch.long), (5, 5), (2, 2)), [x(5, 2, 4)]),
    "TransformerEncoder": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), None, _SEQUENCE),
    "TransformerDecoder": lambda: (nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2), None, [x(2, 5, 8)] * 2),
    **{
        f"MaxUnpool{n}d": lambda n=n: (
            getattr(nn, f"MaxUnpool{n}d")(2),
            lambda m, h: m(*getattr(nn.functional, f"max_pool{n}d")(h, 2, return_indices=True)),
            [x(2, 4, *(6,) * n)],
        )
        for n in (1, 2, 3)
    },
    "LinearCrossEntropyLoss": lambda: (nn.LinearCrossEntropyLoss(6, 5), None, [x(4, 6), i(5, 4)]),
    "Sequential": lambda: (nn.Sequential(nn.Linear(6, 6), nn.RReLU(), nn.BatchNorm1d(6)), None, _ROWS),
    "ModuleList": lambda: (nn.ModuleList([nn.Linear(6, 6), nn.RReLU()]), lambda m, h: m[1](m[0](h)), _ROWS),
    "ModuleDict": lambda: (nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.RReLU()}), lambda m, h: m["b"](m["a"](h)), _ROWS),
    "ParameterList": lambda: (nn.ParameterList([torch.ones(6)]), lambda m, h: (h * m[0]).exp(), _ROWS),
    "ParameterDict": lambda: (nn.ParameterDict({"a": torch.ones(6)}), lambda m, h: (h * m["a"]).exp(), _ROWS),
}  # fmt: skip
# bases, and what needs several devices or processes
NEITHER = {"Container", "Module", "RNNBase", "RNNCellBase", "DataParallel", "SyncBatchNorm"}
LAYERS = [n for n in (*CASES, *OTHERS) if hasattr(nn, n)]


def test_these_are_all_layers() -> None:
    found = {n for n, v in vars(nn).items() if isinstance(v, type) and issubclass(v, nn.Module)}
    assert found - NEITHER == set(LAYERS)


def _made(name: str) -> tuple[Calls, list[Made]]:
    if name in OTHERS:
        layer, call, given = OTHERS[name]()
        return Calls(layer, call), given
    arguments, options, given = CASES[name]
    return Calls(getattr(nn, name)(*arguments, **options)), given


def _steps(name: str, dtype: torch.dtype, training: bool, call: Callable[..., Any]) -> Any:
    seed()
    model, given = _made(name)
    model.to(dtype).train(training)
    seen = []
    for _ in range(3):
        args = [make(dtype) for make in given]
        out = call(model, *args)
        if out.requires_grad:
            out.backward()
        grads = [bits(a.grad) for a in args]
        tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
        seen.append((bits(out), grads, [(bits(t), bits(t.grad)) for t in tensors], rng()))
        model.zero_grad()
    return seen


@pytest.mark.filterwarnings(
    "ignore:Lazy modules", "ignore:.*NLLLoss2d", "ignore:The PyTorch API of nested", "ignore:enable_nested_tensor"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_mode(name: str, dtype: torch.dtype) -> None:
    for training in (True, False):
        try:
            expected = _steps(name, dtype, training, lambda model, *args: model(*args))
        except RuntimeError:  # of a kernel that is not there in this dtype
            assert dtype != torch.float32
            pytest.skip("torch has no such kernel")
        found = _steps(name, dtype, training, lambda *args: ullage.checkpoint(*args, determinism_check="values"))
        assert found == expected, training
