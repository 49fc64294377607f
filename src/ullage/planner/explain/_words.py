"""A unit's option in words: which of its modules' outputs are kept, and which run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ullage.mechanisms import Option, Replays
from ullage.planner.study._executed import StepCapture
from ullage.planner.study._liveness import innermost
from ullage.planner.study._study import Study
from ullage.runtime import ATTENTION, MATMUL
from ullage.runtime.ops._keep import Rule, kind_of, op_name

MOST = 6  # things that one list names
_COPIES = frozenset(
    ["_unsafe_view", "reshape", "lift_fresh", "_to_copy", "clone", "_reshape_alias"]
)  # named no more than views
_SUMS, _PRODUCTS = ("add.Tensor", "add_.Tensor"), ("mul.Tensor", "mul_.Tensor")
_GATES = {"silu": "SwiGLU", "gelu": "GeGLU", "relu": "ReGLU", "sigmoid": "GLU"}
_ACTIVATIONS = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU", "sigmoid": "sigmoid", "tanh": "tanh"}
_PROJECTIONS = {f"{n}_proj" for n in ["q", "k", "v", "o", "qkv", "kv", "out", "in", "gate", "up", "down", "gate_up"]}
_NORMS = ("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm")


class Vocabulary:
    """Names for the ops of one unit's forward.

    Args:
        model: the model.
        fqn: the unit.
        ops: (op, FQN of its innermost module) in the order of one forward.
    """

    def __init__(self, model: nn.Module, fqn: str, ops: Sequence[tuple[Any, str]]) -> None:
        self.model, self.fqn, self.ops = model, fqn, ops
        self.gated = self._gated()
        self.norms = {name for op, at in ops if (name := self.name(op, at)).endswith(" norm")}

    def _gated(self) -> dict[str, str]:
        """Modules in which the output of an activation is multiplied, with what that is called."""
        found = {}
        products = {at for op, at in self.ops if op_name(op) in _PRODUCTS}
        for op, at in self.ops:
            gate = _GATES.get(op_name(op))
            for where in (at, at.rpartition(".")[0]):
                if gate is not None and where in products and where != self.fqn:
                    found[where] = found[at] = gate
                    break
        return found

    def name(self, op: Any, at: str) -> str:
        """A short name of what an op computes; "" for a view or a copy."""
        what = op_name(op)
        if op.is_view or what in _COPIES:
            return ""
        module = self.model.get_submodule(at)
        kind, own = type(module).__name__, at.rpartition(".")[2] if at != self.fqn else ""
        if op in ATTENTION or what.startswith("_scaled_dot_product"):
            return "attention"
        if "Norm" in kind or what in _NORMS:
            return f"{own or 'a'} norm"
        if "Dropout" in kind or what == "native_dropout":
            return "dropout"
        if at in self.gated and (what in _GATES or what in _PRODUCTS):
            return self.gated[at]
        if op in MATMUL:
            inside = next(module.children(), None) is None and own
            return f"{own} layer" if inside else "attention" if "ttention" in kind else "matmuls"
        return self._small(what, kind, own)

    def _small(self, what: str, kind: str, own: str) -> str:
        if "GELU" in kind or what == "gelu":
            return "GELU"
        if what in _ACTIVATIONS:
            return _ACTIVATIONS[what]
        if "ttention" in kind:
            return "attention" if "softmax" in what else "small ops of attention"
        if not own:
            return "sums" if what in _SUMS else "small ops"
        return f"small ops of {own}"

    def listed(self, names: Sequence[str]) -> str:
        """Names as a list in words: "q, k, v, o projections, attention and norms"."""
        whole = self.norms and self.norms <= set(names)
        plain, layers, found = [n.removesuffix(" layer") for n in names if n.endswith(" layer")], False, []
        ends = [n.removesuffix("_proj") for n in plain if n in _PROJECTIONS]
        for n in names:
            if n.endswith(" layer"):
                found += [] if layers else _layers(plain, ends)
                layers = True
            elif n.endswith(" norm"):
                found.append("norms" if whole else n.removesuffix(" norm"))
            else:
                found.append(n)
        found = list(dict.fromkeys(found))
        more = len(found) - MOST
        found = [*found[:MOST], f"{more} more"] if more > 1 else found
        return " and ".join(filter(None, [", ".join(found[:-1]), found[-1]])) if found else ""


def _layers(plain: list[str], ends: list[str]) -> list[str]:
    if not ends:
        return [*plain[:-1], f"{plain[-1]} {'layers' if len(plain) > 1 else 'layer'}"]
    others = [n for n in plain if n not in _PROJECTIONS]
    return [f"{', '.join(ends)} projection{'s' if len(ends) > 1 else ''}", *others]


def words_of(s: Study, capture: StepCapture, fqn: str, option: Option, routing: bool) -> str:
    """What an option does to a unit in a captured step that has it, in words."""
    together = ", together with its neighbours" if option.place is not None else ""
    if option.replays is Replays.WHOLE:
        return f"recomputes everything{together}"
    if option.replays is Replays.NOTHING:
        return f"offloads everything to {option.tier}" if option.tier else "keeps everything"
    rule = option.mechanism.rule(option, routing)
    ops = _forward(s, fqn)
    if rule is None or not ops:
        return option.label
    words = Vocabulary(s.plain_session.inst.model, fqn, ops)
    kept, sent = _chosen(words, rule), _chosen(words, getattr(rule, "moves", None))
    again = [n for n in _again(words, capture, fqn) if n not in kept]
    said = [("keeps", [n for n in kept if n not in sent]), ("offloads", sent), ("recomputes", again)]
    parts = [f"{verb} {words.listed(names)}" for verb, names in said if names]
    return "; ".join(parts) + together


def _forward(s: Study, fqn: str) -> list[tuple[Any, str]]:
    """The ops of a unit's first forward in the plain step."""
    session = s.plain_session
    call = next((c for c in session.calls if c.fqn == fqn), None)
    if call is None:
        return []
    trace = session.trace
    return [
        (session.signatures[trace.signature[i]].func, innermost(session, i))
        for i in range(call.first_op, call.last_op)
        if trace.phase[i] == "forward"
    ]


def _chosen(words: Vocabulary, rule: Rule | None) -> list[str]:
    """Names of the ops that a rule chooses, in the order of the forward."""
    if rule is None:
        return []
    counts, found = Counter[Any](), dict[str, None]()
    for op, at in words.ops:
        kind = kind_of(op, rule)
        if rule(op, counts[kind]) and (name := words.name(op, at)):
            found[name] = None
        counts[kind] += 1
    return list(found)


def _again(words: Vocabulary, capture: StepCapture, fqn: str) -> list[str]:
    """Names of the ops that a unit's replays run, in their order."""

    def ops() -> Iterator[tuple[Any, str]]:
        session, trace = capture.session, capture.session.trace
        for i in range(capture.ops.start, capture.ops.stop):
            if trace.recomputed[i] and fqn in session.tracker.stacks[trace.stack[i]]:
                yield session.signatures[trace.signature[i]].func, innermost(session, i)

    return list(dict.fromkeys(filter(None, (words.name(op, at) for op, at in ops()))))
