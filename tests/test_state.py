"""Applying a plan changes nothing that a person, a file or a copy can see."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ullage as ul
from tests.small import tiny
from tests.zoo import text_ids
from ullage.workload import run_step


@pytest.fixture(scope="module")
def plan() -> ul.Plan:
    return ul.plan(tiny(), policy="every_block", costs="roofline")


@pytest.fixture(scope="module")
def selective() -> ul.Plan:
    return ul.plan(tiny(), policy="selective", costs="roofline")


def _view(model: nn.Module) -> dict[str, Any]:
    """All that others look at."""
    return {
        "state": list(model.state_dict()),
        "parameters": [n for n, _ in model.named_parameters()],
        "buffers": [n for n, _ in model.named_buffers()],
        "modules": [(n, type(m)) for n, m in model.named_modules()],
        "repr": repr(model),
        "signatures": [inspect.signature(m.forward) for m in model.modules()],
        "names": [m.forward.__name__ for m in model.modules()],
        "pickle": pickle.dumps(model),
    }


def _saved(model: nn.Module) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _saved,
    "copy of a copy": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(m)))),
}


def test_nothing_visible_changes(plan: ul.Plan) -> None:
    model = tiny().model
    before = _view(model)
    with plan.apply(model):
        assert _view(model) == before
    assert _view(model) == before


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_plain_models_with_their_own_weights(plan: ul.Plan, name: str) -> None:
    model = tiny().model
    with plan.apply(model) as handle:
        twin = COPIES[name](model)
        assert all("forward" not in vars(m) and "__reduce_ex__" not in vars(m) for m in twin.modules())
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert twin(text_ids(1, 8)).abs().max() == 0
        twin(text_ids(1, 8)).sum().backward()
        assert all(u.fired == 0 for u in handle.report().units)
        assert all(p.grad is None for p in model.parameters())
        with plan.apply(twin) as second:  # a plan of its own
            twin(text_ids(1, 8)).sum().backward()
            assert any(u.fired for u in second.report().units)
    model(text_ids(1, 8)).sum().backward()
    handle.remove()  # twice is no error
    assert model.embed.weight.grad is not None


def test_state_dicts_go_through(plan: ul.Plan, tmp_path: Any) -> None:
    model, fresh = tiny().model, tiny().model
    with plan.apply(model):
        torch.save(model.state_dict(), tmp_path / "state.pt")
        fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
        model.load_state_dict(fresh.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def _shifted(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return type(self).forward(self, x) + 1


def test_an_instances_own_forward_is_used_copied_and_put_back(plan: ul.Plan) -> None:
    model, ids = tiny().model, text_ids(1, 8)
    plain = model.eval()(ids)
    block = model.blocks[0]
    own = block.forward = types.MethodType(_shifted, block)
    shifted = model(ids)
    assert not torch.equal(shifted, plain)
    with plan.apply(model):
        assert block.forward is not own
        assert torch.equal(model(ids), shifted)
        twin = copy.deepcopy(copy.deepcopy(model))
        assert vars(twin.blocks[0])["forward"].__self__ is twin.blocks[0]
        assert torch.equal(twin(ids), shifted)
    assert block.forward is own


def test_a_class_that_copies_its_own_dict(plan: ul.Plan) -> None:
    class Own(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            twin = memo[id(self)] = Own.__new__(Own)
            twin.__dict__ = copy.deepcopy(self.__dict__, memo)
            return twin

    model = nn.Sequential(nn.Sequential(Own(4, 4), nn.Tanh()), nn.Sequential(Own(4, 4), nn.Tanh()))
    work = ul.Workload(model, torch.ones(2, 4), loss=lambda y, x: y.sum())
    made = ul.plan(work, policy="every_block", units=["0.0", "1.0"], costs="roofline")
    with made.apply(model) as handle:
        twin = copy.deepcopy(model)
        assert twin[0][0].forward.__self__ is twin[0][0]
        pickle.dumps(nn.Sequential(*twin[0][1:]))
        twin(torch.ones(1, 4)).sum().backward()
        assert all(u.fired == 0 for u in handle.report().units) and model[0][0].weight.grad is None


def test_a_wrapper_put_over_the_plan_survives_it(plan: ul.Plan) -> None:
    model = tiny().model
    handle = plan.apply(model)
    block = model.blocks[0]
    inner, calls = block.forward, []

    def outer(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return inner(x)

    block.forward = outer
    handle.remove()
    assert block.forward is outer and "__reduce_ex__" not in vars(block)
    model(text_ids(1, 8)).sum().backward()
    assert calls == [1] and all(u.fired == 0 for u in handle.report().units)


def test_hooks_fire_as_often_as_without_a_plan(plan: ul.Plan) -> None:
    model, counts = tiny().model, {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not ul.is_recomputing():  # a module inside a unit runs again, and a hook may well be part of its forward
                counts[name] = counts.get(name, 0) + 1

        return hook

    def register(label: str) -> list[Any]:
        handles = []
        for name in ("blocks.1", "blocks.1.qkv", "head"):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(count(f"{label} {name} before")))
            handles.append(module.register_forward_hook(count(f"{label} {name} after")))
            handles.append(module.register_full_backward_hook(count(f"{label} {name} backward")))
            handles.append(module.register_full_backward_pre_hook(count(f"{label} {name} before backward")))
        return handles

    def step() -> dict[str, int]:
        counts.clear()
        model(text_ids(1, 8)).sum().backward()
        return dict(counts)

    register("early")
    late = register("late")
    expected = step()
    for h in late:
        h.remove()
    with plan.apply(model):
        register("late")
        assert step() == expected and len(expected) == 24
    assert step() == expected


def test_hooks_of_the_unit_itself_do_not_run_again(plan: ul.Plan) -> None:
    model, calls = tiny().model, []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with plan.apply(model):
        model(text_ids(1, 8)).sum().backward()
    assert calls == [1]


def test_two_models_and_a_second_life(plan: ul.Plan, selective: ul.Plan) -> None:
    first, second = tiny(), tiny()
    with plan.apply(first.model) as a, selective.apply(second.model) as b:
        run_step(first.instance())
        assert any(u.fired for u in a.report().units) and not any(u.fired for u in b.report().units)
    with selective.apply(first.model) as c:
        run_step(first.instance())
        assert [u.fired for u in c.report().units if u.action != "keep"] == [1] * 2


def test_the_handle_undoes_the_plan_on_an_exception(plan: ul.Plan) -> None:
    model = tiny().model
    with pytest.raises(KeyError), plan.apply(model):
        raise KeyError
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_model_with_a_plan_is_freed_at_once(plan: ul.Plan) -> None:
    work = tiny()
    handle = plan.apply(work.model)
    run_step(work.instance())
    model = weakref.ref(work.model)
    forward = work.model.blocks[0].forward
    gc.collect()
    gc.disable()
    try:
        del work
        assert model() is None
    finally:
        gc.enable()
    handle.remove()
    with pytest.raises(ul.ApplyError, match=r"blocks.0.*gone"):
        forward(torch.ones(1))
