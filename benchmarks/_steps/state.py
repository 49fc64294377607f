"""Models with modes, caches and state: first forwards that fill tables, statistics, hidden states, generators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from _steps._idiom import ROWS, WIDTH, Block, adamw, idiom, net, square, xs


def _trained(model: nn.Module, batch: Any = None) -> ul.Workload:
    return ul.Workload(model, xs() if batch is None else batch, loss=square, optimizer=adamw(model))


@idiom("modes")
def trained_in_evaluation_mode() -> ul.Workload:
    return _trained(nn.Sequential(net(out=WIDTH), nn.Dropout(0.5), Block()).eval())


@idiom("modes")
def frozen_statistics() -> ul.Workload:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), Block(), nn.BatchNorm1d(WIDTH))
    model[1].eval().requires_grad_(False)
    return _trained(model)


@idiom("modes")
def a_step_that_calls_train_itself() -> ul.Workload:
    model = nn.Sequential(net(out=WIDTH), nn.Dropout(0.5), Block()).eval()
    opt = adamw(model)

    def train_step(model: nn.Module, x: Tensor) -> None:
        model.train()
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        model.eval()
        with torch.no_grad():
            model(x)

    return ul.Workload(model, xs(), step=train_step)


@idiom("modes")
def a_frozen_part_kept_in_evaluation_mode() -> ul.Workload:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).requires_grad_(False)
            self.head = net(2)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.base.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.base(x)
            out: Tensor = self.head(x)
            return out

    return _trained(Frozen().train())


@idiom("modes")
def batch_norm_and_dropout() -> ul.Workload:
    layers = [m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.2))]
    return _trained(nn.Sequential(*layers))


class Rotary(nn.Module):
    """Fills its table in its first forward, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.cos: Tensor | None = None
        self.cached = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.cos is None or self.cached < x.shape[1]:
            self.cached = x.shape[1]
            self.cos = torch.outer(torch.arange(self.cached), 1.0 / 10 ** torch.linspace(0, 3, x.shape[-1])).cos()
        return x * self.cos[: x.shape[1]]


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rotary, self.block = Rotary(), Block()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.rotary(x))
        return out


def sequences() -> Tensor:
    return xs().view(4, ROWS // 4, WIDTH)


@idiom("first forward")
def rotary_tables() -> ul.Workload:
    torch.manual_seed(0)
    return _trained(nn.Sequential(*[Rotated() for _ in range(3)]), sequences())


@idiom("first forward")
def a_mask_cached_in_a_dict() -> ul.Workload:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.masks = nn.Linear(WIDTH, 3 * WIDTH), dict[int, Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            if x.shape[1] not in self.masks:
                self.masks[x.shape[1]] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            scores = (q @ k.mT).masked_fill(~self.masks[x.shape[1]], float("-inf"))
            return x + scores.softmax(-1) @ v

    torch.manual_seed(0)
    return _trained(nn.Sequential(*[Masked() for _ in range(3)]), sequences())


@idiom("first forward")
def a_buffer_registered_in_forward() -> ul.Workload:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.linspace(0, 1, x.shape[1])[:, None], persistent=False)
            out: Tensor = self.block(x + self.table)
            return out

    torch.manual_seed(0)
    return _trained(nn.Sequential(*[Positions() for _ in range(3)]), sequences())


@idiom("first forward")
def old_weight_norm() -> ul.Workload:
    model = net()
    for block in model.blocks:
        nn.utils.weight_norm(block.up)  # type: ignore[union-attr,arg-type]
    return _trained(model)


@idiom("first forward")
def old_spectral_norm() -> ul.Workload:
    model = net()
    for block in model.blocks:
        nn.utils.spectral_norm(block.up)  # type: ignore[union-attr,arg-type]
    return _trained(model)


@idiom("first forward")
def new_spectral_norm() -> ul.Workload:
    model = net()
    for block in model.blocks:
        nn.utils.parametrizations.spectral_norm(block.up)  # type: ignore[union-attr,arg-type]
    return _trained(model)


@idiom("first forward")
def orthogonal_weights() -> ul.Workload:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)])
    for block in model:
        nn.utils.parametrizations.orthogonal(block[0])  # type: ignore[index]
    return _trained(model, xs()[:, :8].contiguous())


@idiom("first forward")
def lazy_layers_after_a_first_call() -> ul.Workload:
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.GELU(), Block(), Block())
    model(xs()[:1])
    return _trained(model)


@idiom("first forward")
def prefix_tuning() -> ul.Workload:
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)

    class Prefixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = transformers.GPT2LMHeadModel(config).requires_grad_(False)
            self.prefix = nn.Parameter(
                torch.randn(2, 2, 2, 4, 16) * 0.02
            )  # layers, keys and values, heads, rows, width

        def forward(self, ids: Tensor) -> Tensor:
            cache = transformers.DynamicCache()
            for layer, (k, v) in enumerate(self.prefix):
                cache.update(k.expand(len(ids), -1, -1, -1), v.expand(len(ids), -1, -1, -1), layer)
            loss: Tensor = self.lm(ids, past_key_values=cache, labels=ids).loss
            return loss

    model = Prefixed()
    return ul.Workload(model, (torch.arange(64) % 60).view(2, 32), optimizer=adamw(model))


class Recurrent(nn.Module):
    """Holds its hidden state from step to step, as truncated backpropagation through time does."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.block = nn.GRU(WIDTH, WIDTH, batch_first=True), Block()
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.rnn(x, self.hidden)
        self.hidden = hidden.detach()
        done: Tensor = self.block(out)
        return done


@idiom("state")
def truncated_backpropagation_through_time() -> ul.Workload:
    torch.manual_seed(0)
    return _trained(nn.Sequential(Recurrent(), Block(), Block()), sequences())


@idiom("state")
def hidden_state_in_the_steps_closure() -> ul.Workload:
    torch.manual_seed(0)
    model = nn.LSTMCell(WIDTH, WIDTH)
    opt, hidden = adamw(model), [torch.zeros(4, WIDTH), torch.zeros(4, WIDTH)]

    def train_step(model: nn.Module, x: Tensor) -> None:
        h, c = (t.detach() for t in hidden)
        loss = torch.zeros(())
        for t in range(4):
            h, c = model(x[:, t], (h, c))
            loss = loss + h.square().mean()
        loss.backward()
        hidden[:] = h, c
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, sequences(), step=train_step)


@idiom("state")
def counters_in_modules() -> ul.Workload:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.calls = Block(), 0
            self.stats: dict[str, int] = {"rows": 0}

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.stats["rows"] += len(x)
            out: Tensor = self.block(x) * (1.0 if self.calls > 0 else 0.5)
            return out

    torch.manual_seed(0)
    return _trained(nn.Sequential(*[Counted() for _ in range(3)]))


@idiom("state")
def a_counter_in_a_buffer() -> ul.Workload:
    class Counted(nn.Module):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            out: Tensor = self.block(x) / self.steps.sqrt().clamp(max=2.0)
            return out

    torch.manual_seed(0)
    return _trained(nn.Sequential(*[Counted() for _ in range(3)]))


@idiom("state")
def generators_of_ones_own() -> ul.Workload:
    class Noisy(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.block, self.generator = Block(), torch.Generator().manual_seed(seed)

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.empty(x.shape).normal_(generator=self.generator)
            out: Tensor = self.block(x + 0.1 * noise)
            return out

    torch.manual_seed(0)
    return _trained(nn.Sequential(*[Noisy(s) for s in range(3)]))


@idiom("state")
def running_statistics_by_hand() -> ul.Workload:
    class Normed(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                with torch.no_grad():
                    self.mean = self.mean.lerp(x.mean(0), 0.1)
            out: Tensor = self.block(x - self.mean)
            return out

    torch.manual_seed(0)
    return _trained(nn.Sequential(*[Normed() for _ in range(3)]))


@idiom("state")
def auxiliary_losses_left_on_modules() -> ul.Workload:
    class Regular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(x)
            self.aux = out.abs().mean()
            return out

    torch.manual_seed(0)
    model = nn.Sequential(*[Regular() for _ in range(3)])
    opt = adamw(model)

    def train_step(model: Any, x: Tensor) -> None:
        (model(x).square().mean() + sum(m.aux for m in model)).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, xs(), step=train_step)


@idiom("state")
def layer_drop_by_pythons_random() -> ul.Workload:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for k, block in enumerate(self.blocks):
                x = x + (block(x) if k % 2 == 0 else F.dropout(block(x), 0.1, self.training))
            return x

    torch.manual_seed(0)
    return _trained(Dropped())
