"""Survey everything reachable from a unit before its first forward, and compare after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ullage._array import elements_of
from ullage._torch import FakeTensor
from ullage.runtime.state._content import content_of, random_state, same_content
from ullage.runtime.state._state import Changes, Path, State, describe
from ullage.runtime.state._traverse import Way, name_of, traverse
from ullage.runtime.state._walk import RANDOM, Step, places
from ullage.runtime.tensors._memory import LEAF, has_memory, kind_of


def _path(way: Way) -> Path:
    steps: list[Any] = []
    while way[0] is not None:
        steps.append(way[1])
        way = way[0]
    return (way[1], *reversed(steps))


class Survey:
    """Everything reachable from some roots, before a forward; `changes` compares it with the state after the forward.

    Args:
        roots: modules, closures' contents and arguments.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self._containers: dict[int, tuple[Way, tuple[Step, ...], Any, Any]] = {}
        self._values: dict[int, tuple[Way, Any, Any, int]] = {}
        self._generators: dict[int, tuple[Way, Any, Any]] = {}
        self._gradients: dict[int, tuple[Way, Tensor, Any, int]] = {}
        self._parameters: dict[int, tuple[Way, Tensor, int]] = {}
        self._seen: dict[int, Any] = {}
        for obj, way in traverse(roots, self._seen):
            self._note(obj, way)

    def _note(self, obj: Any, way: Way) -> None:
        seen = self._seen
        if isinstance(obj, Tensor) and kind_of(obj) == LEAF:
            self._gradients[id(obj)] = (way, obj, obj.grad, _version_of(obj.grad))
        if isinstance(obj, nn.Parameter):
            self._parameters[id(obj)] = (way, obj, obj._version)
        elif isinstance(obj, RANDOM):
            self._generators[id(obj)] = (way, obj, random_state(obj))
        elif isinstance(obj, Tensor | np.ndarray):
            self._values[id(obj)] = (way, obj, *_noted(obj))
        else:
            for steps, place in places(obj):
                if id(place) not in seen or place is obj:
                    seen[id(place)] = place
                    self._containers[id(place)] = (way, steps, place, content_of(place))

    def changes(self, known: set[int], apart: set[int]) -> tuple[Changes, State]:
        """Return what changed since, and a state with the old contents and values.

        Args:
            known: ids of tensors that a plan knows to change.
            apart: ids of containers to ignore, because FSDP changes them.
        """
        containers = [
            ((*_path(w), *steps), o, c)
            for w, steps, o, c in self._containers.values()
            if id(o) not in apart and not same_content(c, content_of(o))
        ]
        values = [
            (_path(w), o, h) for w, o, h, version in self._values.values() if id(o) in known or _moved(o, h, version)
        ]
        parameters = tuple(
            f"parameter {name_of(w)}" for w, p, version in self._parameters.values() if p._version != version
        )
        parameters += tuple(
            f"the gradient of {name_of(w) or 'a tensor that it closes over'}"
            for w, p, grad, version in self._gradients.values()
            if p.grad is not grad or _version_of(p.grad) != version
        )
        # a replay can't put back a tensor without a copy of its values, so it counts as a parameter
        parameters += tuple(describe(p) for p, o, h in values if h is None and not isinstance(o, FakeTensor))
        found = Changes(
            tuple(p for p, _, _ in containers),
            tuple(p for p, _, _ in values),
            tuple(_path(w) for w, _, _ in self._generators.values()),
            parameters,
        )
        entry = State(
            [(o, c) for _, o, c in containers],
            [(o, _restored(o, host)) for _, o, host in values],
            [(g, state) for _, g, state in self._generators.values()],
        )
        return found, entry


def _version_of(grad: Tensor | None) -> int:
    return grad._version if grad is not None else 0


def _noted(obj: Any) -> tuple[Any, int]:
    """Return its values, in host memory that torch's allocators don't count, and its version."""
    if isinstance(obj, np.ndarray):
        return obj.copy(), 0
    if type(obj) is not Tensor or obj.layout != torch.strided or obj.requires_grad or obj.grad_fn is not None:
        return None, obj._version
    return _host_copy(obj), obj._version


# integers of less than a byte, which `copy_` does not support
_UNCOPIED = {getattr(torch, f"{kind}{n}", None) for kind in ("int", "uint") for n in range(1, 8)}
_Copy = tuple[np.ndarray[Any, Any], torch.dtype]  # the elements as raw bytes, and their dtype


def _host_copy(t: Tensor) -> _Copy | None:
    """Copy a plain strided tensor; None for one that is more than its elements (conj, neg, quantized, nested) or has no memory.

    Its version tells whether such a tensor changed, but it can't be put back.
    """
    if t.is_conj() or t.is_neg() or t.is_quantized or t.is_meta or t.is_nested:
        return None
    if t.dtype in _UNCOPIED:
        return None
    try:
        if not has_memory(t):
            return None  # FSDP's parameters, for example, while their storages are freed
        return elements_of(t.detach().cpu()).copy(), t.dtype
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def _moved(obj: Any, host: Any, version: int) -> bool:
    if isinstance(obj, np.ndarray):
        return bool(obj.tobytes() != host.tobytes() or obj.shape != host.shape)
    # also a write that the forward undoes: a replay may stop before it does
    if host is None or obj._version != version:
        return bool(obj._version != version)
    now, (array, dtype) = _host_copy(obj), host
    return now is None or now[0].shape != array.shape or now[1] != dtype or bool(now[0].tobytes() != array.tobytes())


def _restored(obj: Any, host: Any) -> Any:
    if isinstance(obj, np.ndarray) or host is None:
        return host
    array, dtype = host
    if not array.size:
        return torch.empty(array.shape, dtype=dtype, device=obj.device)
    return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype).reshape(array.shape).to(obj.device)
