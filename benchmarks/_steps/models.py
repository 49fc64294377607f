"""Steps with several models and losses: GANs, distillation, averages, references, contrast, several forwards or backwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from _steps._idiom import CLASSES, ROWS, WIDTH, adamw, idiom, net, xs, ys


@idiom("models")
def gan() -> ul.Workload:
    model = nn.ModuleDict({"g": net(out=WIDTH), "d": net(out=1, seed=1)})
    g_opt, d_opt = adamw(model["g"]), adamw(model["d"])
    bce = nn.BCEWithLogitsLoss()

    def train_step(model: Any, real: Tensor) -> None:
        noise = torch.randn_like(real)
        fake = model["g"](noise)
        d_opt.zero_grad()
        (bce(model["d"](real), torch.ones(ROWS, 1)) + bce(model["d"](fake.detach()), torch.zeros(ROWS, 1))).backward()
        d_opt.step()
        g_opt.zero_grad()
        bce(model["d"](fake), torch.ones(ROWS, 1)).backward()
        g_opt.step()

    return ul.Workload(model, xs(), step=train_step)


@idiom("models")
def gan_with_the_critic_outside_the_model() -> ul.Workload:
    generator, critic = net(out=WIDTH), net(out=1, seed=1)
    g_opt, d_opt = adamw(generator), adamw(critic)

    def train_step(model: nn.Module, real: Tensor) -> None:
        fake = model(torch.randn_like(real))
        (critic(fake.detach()).mean() - critic(real).mean()).backward()
        d_opt.step()
        d_opt.zero_grad()
        for p in critic.parameters():
            p.requires_grad_(False)
        (-critic(fake).mean()).backward()
        for p in critic.parameters():
            p.requires_grad_(True)
        g_opt.step()
        g_opt.zero_grad()

    return ul.Workload(generator, xs(), step=train_step)


@idiom("models")
def gradient_penalty() -> ul.Workload:
    critic = net(out=1)
    opt = adamw(critic)

    def train_step(model: nn.Module, real: Tensor) -> None:
        mixed = real.lerp(torch.randn_like(real), torch.rand(ROWS, 1)).requires_grad_()
        (grad,) = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)
        (model(real).mean() + (grad.norm(dim=1) - 1).square().mean()).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(critic, xs(), step=train_step)


@idiom("models")
def distillation_with_the_teacher_in_the_loss() -> ul.Workload:
    student, teacher = net(), net(3, seed=2).eval()

    def loss(output: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            target = (teacher(batch[0]) / 2).softmax(-1)
        return F.kl_div((output / 2).log_softmax(-1), target, reduction="batchmean") + F.cross_entropy(output, batch[1])

    return ul.Workload(student, (xs(), ys()), loss=loss, optimizer=adamw(student))


@idiom("models")
def distillation_of_features_by_hooks() -> ul.Workload:
    student, teacher, feats = net(), net(seed=2).eval(), dict[str, Tensor]()
    student.blocks[1].register_forward_hook(lambda m, a, out: feats.__setitem__("s", out))
    teacher.blocks[1].register_forward_hook(lambda m, a, out: feats.__setitem__("t", out))
    opt = adamw(student)

    def train_step(model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            teacher(x)
        output = model(x)
        (output.square().mean() + F.mse_loss(feats["s"], feats["t"])).backward()
        feats.clear()
        opt.step()
        opt.zero_grad()

    return ul.Workload(student, xs(), step=train_step)


@idiom("models")
def average_of_weights_by_hand() -> ul.Workload:
    model = net()
    average, opt = copy.deepcopy(model).requires_grad_(False), adamw(model)

    def train_step(model: nn.Module, x: Tensor) -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.mul_(0.99).add_(p, alpha=0.01)

    return ul.Workload(model, xs(), step=train_step)


@idiom("models")
def average_in_a_dict() -> ul.Workload:
    model = net()
    shadow, opt = {n: p.detach().clone() for n, p in model.named_parameters()}, adamw(model)

    def train_step(model: nn.Module, x: Tensor) -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        for n, p in model.named_parameters():
            shadow[n] = 0.99 * shadow[n] + 0.01 * p.detach()

    return ul.Workload(model, xs(), step=train_step)


@idiom("models", reads=True)
def average_by_swa_utils() -> ul.Workload:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    opt = adamw(model)

    def train_step(model: nn.Module, x: Tensor) -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        average.update_parameters(model)

    return ul.Workload(model, xs(), step=train_step)


@idiom("models")
def preferences_with_a_reference() -> ul.Workload:
    policy = net()
    reference, opt = copy.deepcopy(policy).eval().requires_grad_(False), adamw(policy)

    def train_step(model: nn.Module, batch: dict[str, Tensor]) -> None:
        def gap(net_: nn.Module) -> Tensor:
            good, bad = net_(batch["chosen"]).log_softmax(-1), net_(batch["rejected"]).log_softmax(-1)
            return good[:, 0] - bad[:, 0]

        with torch.no_grad():
            base = gap(reference)
        (-F.logsigmoid(0.1 * (gap(model) - base)).mean()).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(policy, {"chosen": xs(1), "rejected": xs(2)}, step=train_step)


@idiom("models")
def a_momentum_encoder_with_a_queue() -> ul.Workload:
    class MoCo(nn.Module):
        queue: Tensor
        at: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = net(out=8), net(out=8)
            self.k.requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(8, 128), dim=0))
            self.register_buffer("at", torch.zeros(1, dtype=torch.long))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            q = F.normalize(self.q(a), dim=1)
            with torch.no_grad():
                for pk, pq in zip(self.k.parameters(), self.q.parameters(), strict=True):
                    pk.mul_(0.9).add_(pq, alpha=0.1)
                k = F.normalize(self.k(b), dim=1)
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone().detach()], 1)
            at = int(self.at)
            self.queue[:, at : at + ROWS] = k.T
            self.at[0] = (at + ROWS) % 128
            return F.cross_entropy(logits / 0.07, torch.zeros(ROWS, dtype=torch.long))

    torch.manual_seed(0)
    model = MoCo()
    return ul.Workload(model, (xs(1), xs(2)), optimizer=adamw(model))


@idiom("models")
def contrast_of_two_views() -> ul.Workload:
    model = net(out=16)

    def train_step(model: nn.Module, batch: Any) -> None:
        a, b = (F.normalize(model(v), dim=1) for v in batch)
        logits = a @ b.T / 0.1
        labels = torch.arange(len(logits))
        ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
        opt.step()
        opt.zero_grad()

    opt = adamw(model)
    return ul.Workload(model, [xs(1), xs(2)], step=train_step)


@idiom("models")
def two_towers_with_a_learned_temperature() -> ul.Workload:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = net(out=16), net(out=16, seed=1), nn.Parameter(torch.tensor(2.0))

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            a, b = F.normalize(self.a(image), dim=-1), F.normalize(self.b(text), dim=-1)
            return F.cross_entropy(self.scale.exp() * a @ b.T, torch.arange(len(a), device=a.device))

    model = Towers()
    return ul.Workload(model, {"image": xs(1), "text": xs(2)}, optimizer=adamw(model))


@idiom("models")
def triplets() -> ul.Workload:
    model, opt_loss = net(out=16), nn.TripletMarginLoss()
    opt = adamw(model)

    def train_step(model: nn.Module, batch: Any) -> None:
        opt_loss(*(model(v) for v in batch)).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, (xs(1), xs(2), xs(3)), step=train_step)


@idiom("models")
def two_forwards_with_dropout_compared() -> ul.Workload:
    model = nn.Sequential(net(out=WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, CLASSES))
    opt = adamw(model)

    def train_step(model: nn.Module, batch: Any) -> None:
        a, b = model(batch[0]), model(batch[0])
        loss = F.cross_entropy(a, batch[1]) + F.cross_entropy(b, batch[1])
        (loss + F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, (xs(), ys()), step=train_step)


@idiom("models")
def two_backwards_of_one_graph() -> ul.Workload:
    model = net()
    opt = adamw(model)

    def train_step(model: nn.Module, batch: Any) -> None:
        output = model(batch[0])
        F.cross_entropy(output, batch[1]).backward(retain_graph=True)
        output.square().mean().backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, (xs(), ys()), step=train_step)


@idiom("models")
def adversarial_inputs() -> ul.Workload:
    model = net()
    opt = adamw(model)

    def train_step(model: nn.Module, batch: Any) -> None:
        x, y = batch[0].clone().requires_grad_(), batch[1]
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        F.cross_entropy(model((x + 0.01 * grad.sign()).detach()), y).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, (xs(), ys()), step=train_step)


@idiom("models")
def mixup() -> ul.Workload:
    model = net()
    opt = adamw(model)

    def train_step(model: nn.Module, batch: Any) -> None:
        x, y = batch
        other = torch.randperm(len(x))
        output = model(0.7 * x + 0.3 * x[other])
        (0.7 * F.cross_entropy(output, y) + 0.3 * F.cross_entropy(output, y[other])).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, (xs(), ys()), step=train_step)


@idiom("models")
def several_tasks_with_learned_weights() -> ul.Workload:
    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(out=WIDTH)
            self.heads = nn.ModuleDict({"a": nn.Linear(WIDTH, 3), "b": nn.Linear(WIDTH, 1)})
            self.weights = nn.ParameterDict({k: nn.Parameter(torch.zeros(())) for k in self.heads})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(x)
            out = {k: head(h) for k, head in self.heads.items()}
            return {"loss": sum(o.square().mean() * self.weights[k].exp() for k, o in out.items())}  # type: ignore[dict-item]

    model = Tasks()
    return ul.Workload(model, xs(), optimizer=adamw(model))


@idiom("models")
def denoising_with_a_schedule() -> ul.Workload:
    model, alphas = net(out=WIDTH), torch.linspace(0.99, 0.01, 100)
    opt = adamw(model)

    def train_step(model: nn.Module, x: Tensor) -> None:
        t = torch.randint(0, 100, (len(x),))
        noise, alpha = torch.randn_like(x), alphas[t][:, None]
        F.mse_loss(model(alpha.sqrt() * x + (1 - alpha).sqrt() * noise), noise).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, xs(), step=train_step)


@idiom("models")
def accumulation_in_a_loop() -> ul.Workload:
    model = net()
    opt = adamw(model)

    def train_step(model: nn.Module, batch: Any) -> None:
        opt.zero_grad()
        for x, y in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
            (F.cross_entropy(model(x), y) / 4).backward()
        opt.step()

    return ul.Workload(model, (xs(), ys()), step=train_step)


@idiom("models")
def inner_and_outer_parameters() -> ul.Workload:
    model = net()
    opt = adamw(model)

    def train_step(model: nn.Module, batch: Any) -> None:
        params = dict(model.named_parameters())
        x, y = batch
        inner = F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
        F.cross_entropy(torch.func.functional_call(model, fast, (x,)), y).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(model, (xs(), ys()), step=train_step)
