"""Run a function so that backward rebuilds its activations: the runtime that `ullage.checkpoint` and plans stand on."""

from ullage import _array, _source
from ullage._torch import _autograd as _torch_autograd
from ullage._torch import _tensors as _torch_tensors
from ullage.runtime.ambient import _ambient, _local, _settings, _totals
from ullage.runtime.ambient._ambient import host_rng, host_rng_moved, rng_states_from
from ullage.runtime.ambient._eager import keep_eager
from ullage.runtime.ambient._local import (
    Apart,
    is_bookkeeping,
    is_recomputing,
    recomputing_units,
    telling_of_skips,
    unit_of,
)
from ullage.runtime.ambient._totals import totals
from ullage.runtime.forward import _frame, _learn, _packing
from ullage.runtime.forward._checkpoint import checkpoint, run
from ullage.runtime.ops import _debug, _log, _select, _watch, _writes
from ullage.runtime.ops._keep import ATTENTION, LEVELS, MATMUL, ROUTING, Rule, level_rule
from ullage.runtime.ops._log import draws
from ullage.runtime.ops._select import selection_of
from ullage.runtime.replay import _after, _collect, _reads, _replay, _skip, _sweep
from ullage.runtime.state import _classes, _content, _gathered, _reach, _state, _survey, _traverse, _walk
from ullage.runtime.state import _warn_each_time as _again
from ullage.runtime.tensors import _digest, _fills, _jagged, _memory, _notes, _sparse
from ullage.runtime.unit import _ahead, _call, _inputs, _modified, _options, _place, _site, _tier
from ullage.runtime.unit._options import Options
from ullage.runtime.unit._place import Place, Trail
from ullage.runtime.unit._site import Learnt, Shared, Site
from ullage.runtime.unit._tier import Tier, run_offloaded

__all__ = [
    "ATTENTION",
    "LEVELS",
    "MATMUL",
    "ROUTING",
    "Apart",
    "Learnt",
    "Options",
    "Place",
    "Rule",
    "Shared",
    "Site",
    "Tier",
    "Trail",
    "checkpoint",
    "draws",
    "host_rng",
    "host_rng_moved",
    "is_bookkeeping",
    "is_recomputing",
    "level_rule",
    "recomputing_units",
    "rng_states_from",
    "run",
    "run_offloaded",
    "selection_of",
    "telling_of_skips",
    "totals",
    "unit_of",
]  # fmt: skip

_EAGER = [
    _array, _source, _torch_autograd, _torch_tensors, _after, _again, _ahead, _ambient, _call, _classes, _collect, _content, _debug, _digest, _fills, _frame, _gathered, _inputs, _jagged, _learn, _local, _log, _memory, _modified, _notes, _options, _packing, _place, _reach, _reads, _replay,
    _select, _settings, _site, _skip, _sparse, _state, _survey, _sweep, _tier, _totals, _traverse, _walk, _watch, _writes,
]  # fmt: skip
keep_eager(_EAGER)
