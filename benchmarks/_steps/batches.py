"""Batches as loaders give them, and losses as people name them."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ullage as ul
from _steps._idiom import ROWS, WIDTH, adamw, idiom, net, square, xs, ys

Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    x: Tensor
    y: Tensor
    name: str = "train"


def _with(batch: Any, labels: Any) -> ul.Workload:
    model = net()
    return ul.Workload(model, batch, loss=lambda out, b: F.cross_entropy(out, labels(b)), optimizer=adamw(model))


def _step(batch: Any, parts: Any) -> ul.Workload:
    model = net()
    optimizer = adamw(model)

    def train_step(model: nn.Module, batch: Any) -> None:
        x, y = parts(batch)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return ul.Workload(model, batch, step=train_step)


@idiom("batch")
def a_list_of_a_loader() -> ul.Workload:
    return _with(next(iter(DataLoader(TensorDataset(xs(), ys()), batch_size=ROWS))), lambda b: b[1])


@idiom("batch")
def a_tuple_with_a_loss() -> ul.Workload:
    return _with((xs(), ys()), lambda b: b[1])


@idiom("batch")
def a_named_tuple() -> ul.Workload:
    return _with(Pair(xs(), ys()), lambda b: b.y)


@idiom("batch")
def a_dict_with_labels_beside() -> ul.Workload:
    return _with({"x": xs(), "y": ys()}, lambda b: b["y"])


@idiom("batch")
def a_dict_with_strings_and_ints() -> ul.Workload:
    return _with({"x": xs(), "y": ys(), "file": "a.jpg", "index": 3, "weights": [1.0, 2.0]}, lambda b: b["y"])


@idiom("batch")
def a_user_dict() -> ul.Workload:
    return _with(UserDict(x=xs(), y=ys()), lambda b: b["y"])


@idiom("batch")
def a_dataclass_in_a_step() -> ul.Workload:
    return _step(Sample(xs(), ys()), lambda b: (b.x, b.y))


@idiom("batch")
def a_nested_batch() -> ul.Workload:
    batch = {"views": [xs(), xs(2)], "target": {"y": ys(), "ids": ["a", "b"]}}
    return _step(batch, lambda b: (b["views"][0] + b["views"][1], b["target"]["y"]))


@idiom("batch")
def a_batch_moved_to_the_device() -> ul.Workload:
    return _step([xs(), ys()], lambda b: tuple(t.to("cpu", non_blocking=True) for t in b))


@idiom("batch")
def a_batch_that_is_cast() -> ul.Workload:
    return _step([xs().double(), ys().int()], lambda b: (b[0].float(), b[1].long()))


@idiom("batch")
def images_of_bytes() -> ul.Workload:
    pixels = (xs().abs() * 50).to(torch.uint8)
    return _step((pixels, ys()), lambda b: (b[0].float().div_(255).sub_(0.5), b[1]))


@idiom("batch")
def a_batch_encoding() -> ul.Workload:
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForSequenceClassification(config)
    ids = (torch.arange(64) % 60).view(4, 16)
    batch = transformers.BatchEncoding(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}
    )
    return ul.Workload(model, batch, optimizer=adamw(model))


@idiom("batch")
def a_padded_text_batch() -> ul.Workload:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config)
    ids = (torch.arange(64) % 60).view(2, 32)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return ul.Workload(model, batch, optimizer=adamw(model))


@idiom("batch")
def a_loss_module() -> ul.Workload:
    model = net()
    return ul.Workload(model, (xs(), ys()), loss=nn.CrossEntropyLoss(), optimizer=adamw(model))


@idiom("batch")
def a_loss_function_of_torch() -> ul.Workload:
    model = net()
    return ul.Workload(model, (xs(), ys()), loss=F.cross_entropy, optimizer=adamw(model))


@idiom("batch")
def a_loss_module_and_a_dict() -> ul.Workload:
    model = net()
    return ul.Workload(model, {"x": xs(), "labels": ys()}, loss=nn.CrossEntropyLoss(), optimizer=adamw(model))


@idiom("batch")
def a_loss_with_label_smoothing_and_weights() -> ul.Workload:
    model = net()
    criterion = nn.CrossEntropyLoss(weight=torch.ones(5), label_smoothing=0.1)
    return ul.Workload(model, (xs(), ys()), loss=lambda out, b: criterion(out, b[1]), optimizer=adamw(model))


@idiom("batch")
def autoencoder_with_mse_loss() -> ul.Workload:
    model = net(out=WIDTH)
    return ul.Workload(model, xs(), loss=nn.MSELoss(), optimizer=adamw(model))


@idiom("batch")
def accumulated_micro_batches() -> ul.Workload:
    model = net()
    return ul.Workload(
        model, (xs(), ys()), loss=lambda o, b: F.cross_entropy(o, b[1]), optimizer=adamw(model), accumulate=3
    )


@idiom("batch")
def autocast_to_bfloat16() -> ul.Workload:
    model = net()
    return ul.Workload(model, xs(), loss=square, optimizer=adamw(model), autocast=torch.bfloat16)


@idiom("batch")
def ragged_lists_of_tensors() -> ul.Workload:
    model = net()
    boxes = [torch.rand(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (3, 7, 12)]

    def train_step(model: nn.Module, batch: list[Tensor]) -> None:
        sum(model(b).square().mean() for b in batch).backward()  # type: ignore[union-attr]
        model.zero_grad()

    return ul.Workload(model, boxes, step=train_step)
