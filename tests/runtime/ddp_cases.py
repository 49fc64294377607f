"""What PyTorch's tests of checkpointing under DistributedDataParallel check, by one of two processes: `python -m tests.runtime.ddp_cases RANK STORE`.

Each case trains three steps with the plain model, torch's checkpoint and ullage's, all under DDP, and prints who has the plain model's
gradients, bit for bit, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint as tc
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ullage

Call = Callable[..., Any]
CALLS: dict[str, Call] = {
    "plain": lambda f, *a: f(*a),
    "torch": lambda f, *a: tc.checkpoint(f, *a, use_reentrant=False),
    "ullage": ullage.checkpoint,
    "keep": lambda f, *a: ullage.checkpoint(f, *a, keep="matmul_attention"),
}
STEPS = 3


class Once(nn.Module):
    """One layer of two is checkpointed."""

    def __init__(self, call: Call, shared: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Linear(20, 20), nn.Linear(20, 20), call
        if shared:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.call(self.b, F.relu(self.call(self.a, x))) if self._both(step) else self._one(x)  # type: ignore[no-any-return]

    def _both(self, step: int) -> bool:
        return False

    def _one(self, x: Tensor) -> Tensor:
        return self.call(self.b, F.relu(self.a(x)))  # type: ignore[no-any-return]


class Twice(Once):
    """A layer is checkpointed two times in a step."""

    def _one(self, x: Tensor) -> Tensor:
        return self.call(self.b, self.call(self.b, F.relu(self.a(x))))  # type: ignore[no-any-return]


class Unused(Once):
    """Has parameters that no step uses."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.c = nn.Linear(20, 20)


class Dynamic(Once):
    """Layers are used by turns: those of a step hang on its number."""

    def _both(self, step: int) -> bool:
        return step % 2 == 0


CASES: dict[str, tuple[Callable[[Call], nn.Module], dict[str, Any]]] = {
    "once": (Once, {}),
    "once_static_graph": (Once, {"static_graph": True}),
    "unused_params": (Unused, {"find_unused_parameters": True}),
    "unused_params_static_graph": (Unused, {"static_graph": True}),
    "twice": (Twice, {}),
    "twice_unused_looked_for": (Twice, {"find_unused_parameters": True}),
    "twice_static_graph": (Twice, {"static_graph": True}),
    "dynamic_module": (Dynamic, {"find_unused_parameters": True}),
    "dynamic_weight_sharing": (lambda call: Dynamic(call, shared=True), {"find_unused_parameters": True}),
    "weight_sharing": (lambda call: Once(call, shared=True), {}),
    "weight_sharing_static_graph": (lambda call: Once(call, shared=True), {"static_graph": True}),
    "twice_weight_sharing": (lambda call: Twice(call, shared=True), {}),
}


def _gradients(make: Callable[[Call], nn.Module], options: dict[str, Any], call: Call, view: bool, rank: int) -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(make(call), gradient_as_bucket_view=view, **options)
    found = []
    for step in range(STEPS):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(10 * step + rank), requires_grad=True)
        model(x, step).sum().backward()
        found.append([p.grad.clone() if p.grad is not None else None for p in model.parameters()])
        model.zero_grad()
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b if a is None or b is None else torch.equal(a, b)


def _judged(name: str, view: bool, rank: int) -> dict[str, str]:
    make, options = CASES[name]
    truth = _gradients(make, options, CALLS["plain"], view, rank)
    said = {}
    for who, call in CALLS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                said[who] = "same" if _same(_gradients(make, options, call, view, rank), truth) else "other gradients"
            except Exception as error:
                said[who] = f"{type(error).__name__}: {error}".partition("\n")[0]
        ours = [str(w.message) for w in caught if issubclass(w.category, ullage.UllageWarning)]
        said[who] += f", warned: {ours[0]}" if ours else ""
    return said


def main() -> None:
    """Run all cases; the first process prints what both agree on."""
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    print(json.dumps({f"{name}-{view}": _judged(name, view, rank) for name in CASES for view in (False, True)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
