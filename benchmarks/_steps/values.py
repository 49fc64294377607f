"""Steps that read values of activations: logs, guards, closures of optimizers, indices, masks, sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from _steps._idiom import CLASSES, ROWS, WIDTH, Block, adamw, idiom, net, square, xs, ys

Log = list[Any]


def _logged(name: str, after: Callable[[Tensor, Tensor, Log], None]) -> None:
    """A step that does something with its loss and output before backward."""

    def make() -> ul.Workload:
        model, log = net(), list[Any]()
        opt = adamw(model)

        def train_step(model: nn.Module, batch: Any) -> None:
            output = model(batch[0])
            loss = F.cross_entropy(output, batch[1])
            after(loss, output, log)
            loss.backward()
            opt.step()
            opt.zero_grad()

        return ul.Workload(model, (xs(), ys()), step=train_step)

    make.__name__ = name
    idiom("values", reads=True)(make)


def _guard(loss: Tensor, output: Tensor, log: Log) -> None:
    if not torch.isfinite(loss):
        raise RuntimeError("the loss is not finite")


def _nan(loss: Tensor, output: Tensor, log: Log) -> None:
    if math.isnan(loss.item()):
        raise RuntimeError("the loss is not a number")


_logged("loss item appended", lambda loss, out, log: log.append(loss.item()))
_logged("loss in an f string", lambda loss, out, log: log.append(f"{loss:.3f}"))
_logged("float of the loss", lambda loss, out, log: log.append(float(loss)))
_logged("a guard on isfinite", _guard)
_logged("a guard on isnan of item", _nan)
_logged("accuracy by argmax", lambda loss, out, log: log.append((out.argmax(-1) == ys()).float().mean().item()))
_logged("tolist of the predictions", lambda loss, out, log: log.extend(out.argmax(-1).tolist()))
_logged("numpy of the output", lambda loss, out, log: log.append(out.detach().numpy().mean()))
_logged("top values to the host", lambda loss, out, log: log.append(out.topk(2).values.detach().cpu().tolist()))


@idiom("values", reads=True)
def a_step_that_skips_on_the_norm() -> ul.Workload:
    model = net()
    opt = adamw(model)

    def train_step(model: nn.Module, x: Tensor) -> None:
        model(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            opt.step()
        opt.zero_grad()

    return ul.Workload(model, xs(), step=train_step)


@idiom("values", reads=True)
def gradients_scaled() -> ul.Workload:
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=8.0)
    opt = adamw(model)

    def train_step(model: nn.Module, x: Tensor) -> None:
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    return ul.Workload(model, xs(), step=train_step)


@idiom("values", reads=True)
def lbfgs() -> ul.Workload:
    model = net()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def train_step(model: nn.Module, x: Tensor) -> None:
        def closure() -> Tensor:
            opt.zero_grad()
            loss: Tensor = model(x).square().mean()
            loss.backward()
            return loss

        opt.step(closure)  # type: ignore[arg-type]

    return ul.Workload(model, xs(), step=train_step)


@idiom("values", reads=True)
def distributions() -> ul.Workload:
    model = net(out=2 * WIDTH)

    def loss(output: Tensor, x: Tensor) -> Tensor:
        mean, scale = output.chunk(2, -1)
        posterior = torch.distributions.Normal(mean, F.softplus(scale) + 1e-3)
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        kl = torch.distributions.kl_divergence(posterior, prior).mean()
        return F.mse_loss(posterior.rsample(), x) + kl

    return ul.Workload(model, xs(), loss=loss, optimizer=adamw(model))


@idiom("values", reads=True)
def policy_gradient_with_an_early_stop() -> ul.Workload:
    policy = net()
    opt = adamw(policy)

    def train_step(model: nn.Module, batch: dict[str, Tensor]) -> None:
        for _ in range(2):
            dist = torch.distributions.Categorical(logits=model(batch["obs"]))
            ratio = (dist.log_prob(batch["action"]) - batch["old"]).exp()
            loss = -torch.min(ratio * batch["gain"], ratio.clamp(0.8, 1.2) * batch["gain"]).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            kl = (batch["old"] - dist.log_prob(batch["action"])).mean().item()
            if kl > 1e9:
                break

    batch = {"obs": xs(), "action": ys(), "old": torch.full((ROWS,), -1.6), "gain": torch.linspace(-1, 1, ROWS)}
    return ul.Workload(policy, batch, step=train_step)


@idiom("values", reads=True)
def a_codebook() -> ul.Workload:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc, self.dec, self.book = net(out=8), nn.Linear(8, WIDTH), nn.Embedding(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            z = self.enc(x)
            index = torch.cdist(z, self.book.weight).argmin(-1)
            q = self.book(index)
            out = self.dec(z + (q - z).detach())
            return F.mse_loss(out, x) + F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())

    torch.manual_seed(0)
    model = Quantized()
    return ul.Workload(model, xs(), optimizer=adamw(model))


@idiom("values", reads=True)
def rows_chosen_by_an_index() -> ul.Workload:
    model = net(out=WIDTH)
    table = nn.Parameter(torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0)))
    opt = torch.optim.AdamW([*model.parameters(), table])

    def train_step(model: nn.Module, x: Tensor) -> None:
        h = model(x)
        rows = (h.sigmoid().mean(-1) * 31).long()
        (h + table[rows]).square().mean().backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, xs(), step=train_step)


@idiom("values")
def a_mask_of_the_batch() -> ul.Workload:
    model = net()

    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output[batch["mask"]], batch["y"][batch["mask"]])

    batch = {"x": xs(), "y": ys(), "mask": torch.arange(ROWS) % 3 != 0}
    return ul.Workload(model, batch, loss=loss, optimizer=adamw(model))


@idiom("values", reads=True)
def a_mask_of_activations() -> ul.Workload:
    model = net()

    def loss(output: Tensor, x: Tensor) -> Tensor:
        sure = output.softmax(-1).amax(-1) > 0.25
        return F.cross_entropy(output[sure], output[sure].argmax(-1)) + output.square().mean()

    return ul.Workload(model, xs(), loss=loss, optimizer=adamw(model))


@idiom("values")
def ctc() -> ul.Workload:
    model = net()

    def loss(output: Tensor, batch: Any) -> Tensor:
        logp = output.view(16, 4, CLASSES).log_softmax(-1)
        return F.ctc_loss(logp, batch["y"], batch["in"], batch["out"])

    batch = {
        "x": xs(),
        "y": torch.arange(12).view(4, 3) % 4 + 1,
        "in": torch.full((4,), 16),
        "out": torch.tensor([3, 2, 1, 3]),
    }
    return ul.Workload(model, batch, loss=loss, optimizer=adamw(model))


@idiom("values")
def packed_sequences() -> ul.Workload:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.block = nn.LSTM(WIDTH, WIDTH, batch_first=True), Block()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            done: Tensor = self.block(out)
            return done

    torch.manual_seed(0)
    model = Packed()
    return ul.Workload(
        model, (xs().view(4, 16, WIDTH), torch.tensor([16, 9, 4, 12])), loss=square, optimizer=adamw(model)
    )


@idiom("values")
def a_sparse_adjacency() -> ul.Workload:
    model, graph = net(), torch.eye(ROWS).to_sparse()
    return ul.Workload(model, xs(), loss=lambda o, b: torch.sparse.mm(graph, o).square().mean(), optimizer=adamw(model))


@idiom("values", reads=True)
def routing_to_experts() -> ul.Workload:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            weight, chosen = self.router(x).softmax(-1).max(-1)
            out = torch.zeros_like(x)
            for k, expert in enumerate(self.experts):
                rows = torch.nonzero(chosen == k)[:, 0]
                out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
            return out

    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Block())
    return ul.Workload(model, xs(), loss=square, optimizer=adamw(model))


@idiom("values", reads=True)
def routing_with_a_capacity() -> ul.Workload:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            gate = self.router(x).softmax(-1)
            out = torch.zeros_like(x)
            for k, expert in enumerate(self.experts):
                weight, rows = gate[:, k].topk(len(x) // 3)
                out = out.index_add(0, rows, expert(x[rows]) * weight[:, None])
            return out

    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Block())
    return ul.Workload(model, xs(), loss=square, optimizer=adamw(model))


@idiom("values", reads=True)
def unique_ids_of_the_batch() -> ul.Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, WIDTH), Block(), Block())
    opt = adamw(model)

    def train_step(model: nn.Module, ids: Tensor) -> None:
        unique, inverse = ids.unique(return_inverse=True)
        model(unique)[inverse].square().mean().backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, torch.arange(ROWS) % 17, step=train_step)
