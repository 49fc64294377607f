"""Dicts of parameters in which FSDP2 (`fully_shard`) swaps a module's shards for gathered parameters, and back.

Such a swap is no change of the parameter: the versions of both tensors tell whether somebody wrote to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ullage.runtime.state._reach import Reached


def swapped(reached: Reached) -> set[int]:
    """Return the ids of the dicts of parameters in which FSDP2 swaps shards."""
    infos = [parameter._module_info for parameter in _parameters(reached)]
    modules = [m for info in infos for m in (info.module, *info.shared_modules)]
    return {id(m._parameters) for m in modules}


def _parameters(reached: Reached) -> Iterator[Any]:
    for below in reached.below:
        for r in below.modules:
            state_of = getattr(r(), "_get_fsdp_state", None)
            if state_of is None:
                continue
            state = state_of()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # torch 2.11 has one group or None
                groups = [g for g in [getattr(state, "_fsdp_param_group", None)] if g is not None]
            for group in groups:
                yield from group.fsdp_params
