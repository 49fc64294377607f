"""Without gradients a plan is a pass-through: the same outputs, not a byte and not a warning more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ullage as ul
from tests.small import next_byte, tiny
from tests.zoo import text_ids
from ullage.measure import record_allocations


def _peak(call: Callable[[], Any]) -> int:
    live = peak = 0
    for event in record_allocations(call):
        live += event.nbytes
        peak = max(peak, live)
    return peak


def _hf(kind: str) -> tuple[nn.Module, Any]:
    import transformers as hf

    torch.manual_seed(0)
    kw: dict[str, Any] = dict(vocab_size=256, bos_token_id=1, eos_token_id=255, pad_token_id=0)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**kw, **small)), {}
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(**kw, n_embd=32, n_layer=2, n_head=2, n_positions=64)), {}
    t5 = hf.T5Config(**kw, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(t5), {}


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def planned(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, ul.Plan]]:
    model, _ = _hf(request.param)
    ids = text_ids(2, 16)
    work = ul.Workload(model.train(), {"input_ids": ids, "labels": ids, "use_cache": False})
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert sum(d.action == "recompute" for d in plan.decisions) >= 2
    yield model, plan


def test_generate_with_its_cache(planned: tuple[nn.Module, ul.Plan]) -> None:
    model, plan = planned
    ids, kw = text_ids(2, 8), dict(max_new_tokens=6, do_sample=False, use_cache=True, attention_mask=torch.ones(2, 8))

    def generate() -> torch.Tensor:
        return model.eval().generate(ids, **kw)

    generate()  # what is allocated once and for all
    expected, plain = generate(), _peak(generate)
    with warnings.catch_warnings(), plan.apply(model) as handle:
        warnings.simplefilter("error")
        assert torch.equal(generate(), expected)
        assert _peak(generate) == plain
        assert all(u.fired == 0 for u in handle.report().units)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
def test_forward_without_gradients(mode: Any, training: bool) -> None:
    work = tiny()
    plan = ul.plan(work, policy="selective", costs="roofline")
    model = work.model.train(training)

    def forward() -> torch.Tensor:
        torch.manual_seed(0)
        with mode():
            return model(work.batch)

    forward()
    expected, plain = forward(), _peak(forward)
    with warnings.catch_warnings(), plan.apply(model) as handle:
        warnings.simplefilter("error")
        assert torch.equal(forward(), expected)
        assert _peak(forward) == plain
        assert all(u.fired == 0 for u in handle.report().units)


def _gradients(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    next_byte(model(ids), ids).backward()
    return [p.grad.clone() for p in model.parameters()]


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradients_in_eval_mode_and_after_inference() -> None:
    work = tiny()
    plan = ul.plan(work, policy="every_block", costs="roofline")
    model, ids = work.model.eval(), work.batch
    expected = _gradients(model, ids)
    with plan.apply(model) as handle:
        with torch.inference_mode():
            model(ids)
        assert _same(_gradients(model, ids), expected)
        assert any(u.recomputed for u in handle.report().units)


def test_batches_of_other_shapes_are_exact_and_said_once() -> None:
    work = tiny()
    plan = ul.plan(work, "99% of plain", policy="every_block", costs="roofline")
    model = work.model
    batches = [text_ids(*s) for s in ((3, 32), (4, 20), (1, 1 + 32), (4, 33), (4, 64), (9, 64))]
    expected = [_gradients(model, ids) for ids in batches]
    with plan.apply(model) as handle, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for ids, want in zip(batches, expected, strict=True):
            assert _same(_gradients(model, ids), want)
    mine = [w for w in said if issubclass(w.category, ul.UllageWarning)]
    assert len(mine) == 1 and "plan again for this shape" in str(mine[0].message)
    assert handle.report().larger_batches == 3


def test_a_smaller_batch_says_nothing(planned: tuple[nn.Module, ul.Plan]) -> None:
    model, plan = planned
    model.train()
    for ids in (text_ids(2, 16), text_ids(1, 16), text_ids(2, 5)):

        def gradients(ids: torch.Tensor = ids) -> list[torch.Tensor]:
            model.zero_grad()
            torch.manual_seed(0)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            return [p.grad.clone() for p in model.parameters()]

        expected = gradients()
        with plan.apply(model) as handle, warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _same(gradients(), expected)
            assert handle.report().larger_batches == 0


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    work = tiny()
    plan = ul.plan(work, policy="every_block", costs="roofline")
    with plan.apply(work.model) as handle:
        monkeypatch.setenv("ULLAGE_DISABLE", "1")
        _gradients(work.model, work.batch)
        monkeypatch.setenv("ULLAGE_DISABLE", "0")
        assert all(u.fired == 0 for u in handle.report().units)
        _gradients(work.model, work.batch)
        assert any(u.fired for u in handle.report().units)
    monkeypatch.setenv("ULLAGE_DISABLE", "1")
    with plan.apply(work.model):
        assert all("forward" not in vars(m) for m in work.model.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Dynamo's own
def test_under_compile() -> None:
    """Dynamo sees a callable object in place of the method: it must trace through it, or fall back, and stay exact."""
    work = tiny()
    plan = ul.plan(work, policy="every_block", costs="roofline")
    model, ids = work.model.eval(), work.batch
    expected = _gradients(model, ids)
    with plan.apply(model):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert _same(_gradients(compiled, ids), expected)
