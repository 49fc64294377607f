"""Rules that name the ops a replay must not run: named levels, single calls of ops, collections of ops, callables."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ullage._errors import ArgumentError
from ullage._torch import OpOverload, OpOverloadPacket

aten = torch.ops.aten

Rule = Callable[[Any, int], bool]  # (op, n): must a replay not run the n-th call of its kind?
Keep = str | Collection[Any] | Callable[[Any], bool]  # or an OpsRule

_names = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _flash_attention_forward "
    "_efficient_attention_forward"
)
ATTENTION = {getattr(aten, n).default for n in _names.split() if hasattr(aten, n)}
# The kernel depends on the device: a rule that was made on a CPU names this op, and means any of them.
SDPA = "scaled_dot_product_attention"
_SDPA_KERNELS = frozenset(op for op in ATTENTION if op._schema.name.startswith("aten::_scaled_dot_product_"))
MATMUL = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
MATMUL |= {op.default for n in ("_grouped_mm", "_scaled_mm") if (op := getattr(aten, n, None)) is not None}
# Kept at every level of a plan: an index that came out differently would send a token to another expert than in the forward. They are
# small beside the activations.
ROUTING = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argmax.default}
ROUTING |= {aten.nonzero.default, aten.multinomial.default, aten.max.dim, aten.min.dim}

# From the most saved bytes to the least. Every second matmul is torchtitan's default (its own comment calls it
# arbitrary); it is offered as one level among others and chosen only where the solver finds it best.
LEVELS = {
    "matmul_attention": "keep the outputs of matmuls, convolutions and attention",
    "half_matmul_attention": "keep the outputs of every second matmul or convolution and of attention",
    "attention": "keep the outputs of attention",
}


class LevelRule:
    """The rule of a named level; "" keeps routing outputs only."""

    def __init__(self, level: str, routing: bool = True) -> None:
        self.name, self.level, self.routing = f"{level}+{routing}", level, routing

    def __call__(self, op: Any, n: int) -> bool:
        """See `Rule`; matmuls are one kind, see `kind_of`."""
        if op in ROUTING:
            return self.routing
        if op in ATTENTION:
            return bool(self.level)
        if op not in MATMUL or self.level in ("", "attention"):
            return False
        return self.level == "matmul_attention" or n % 2 == 0


class CallableRule:
    """The rule of a user's callable. A lambda written in a call is another object at each call, but compares as the same rule."""

    def __init__(self, keep: Callable[[Any], bool]) -> None:
        self.keep = keep
        code = getattr(keep, "__code__", None)
        self._is = [code] if code is not None else [keep]
        if code is not None:
            self._is += [
                *(c.cell_contents for c in getattr(keep, "__closure__", None) or ()),
                *(getattr(keep, "__defaults__", None) or ()),
            ]

    def __call__(self, op: Any, n: int) -> bool:
        """See `Rule`."""
        return bool(self.keep(op))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CallableRule) or len(self._is) != len(other._is):
            return False
        return self.keep == other.keep or all(a is b for a, b in zip(self._is, other._is, strict=True))

    def __hash__(self) -> int:
        return hash(getattr(self.keep, "__code__", type(self.keep)))


@dataclass(frozen=True)
class OpsRule:
    """Names single calls of ops, such as `gelu[0]+mm[0,2,5-7]@disk`: the first call of gelu, and five calls of mm.

    Attributes:
        calls: (name, n): see `op_name` and `portable_name`; n counts the calls of this very overload, those of the kernels of
            `scaled_dot_product_attention` together, from 0.
        routing: keep routing outputs too, as at a level.
        leaving: the calls whose outputs are offloaded (`@host`, `@disk`).
        tier: where they are offloaded to.
    """

    calls: frozenset[tuple[str, int]]
    routing: bool = False
    leaving: frozenset[tuple[str, int]] = frozenset()
    tier: str = ""

    @classmethod
    def from_text(cls, text: str, routing: bool = False) -> OpsRule:
        """Read a rule from its text, the inverse of `text`.

        Raises:
            ValueError: it is no such text, names two tiers, or names an op that torch does not have. Ops of other libraries
                are not looked up: they may be registered later.
        """
        staying: set[tuple[str, int]] = set()
        leaving: set[tuple[str, int]] = set()
        tiers: set[str] = set()
        for part in text.split("+"):
            found = _CALLS.fullmatch(part)
            if found is None:
                raise ValueError(
                    f"{part!r} in {text!r}: expected an op and which of its calls, such as mm[0,2] or mm[0,2]@disk"
                )
            name = found["op"].removeprefix("aten::").removesuffix(".default")
            if _find_op(name) is None and (found["ns"] or "aten") in _TORCHS:
                raise ValueError(f"{name!r} in {text!r}: torch has no such op")
            for run in found["calls"].split(","):
                first, _, last = run.partition("-")
                if int(last or first) < int(first):
                    raise ValueError(f"{part!r} in {text!r}: {run} is no range")
                named = {(name, n) for n in range(int(first), int(last or first) + 1)}
                (leaving if found["tier"] else staying).update(named)
                tiers.update({found["tier"]} - {None})
        for name, n in sorted(staying & leaving):
            raise ValueError(f"{text!r}: {name}[{n}] is to stay in memory and to leave it")
        if len(tiers) > 1:
            raise ValueError(f"{text!r}: names {' and '.join(sorted(tiers))}; tensors are offloaded to one of them")
        return cls(frozenset(staying | leaving), routing, frozenset(leaving), *tiers)

    def sent(self, tier: str, leaving: frozenset[tuple[str, int]]) -> OpsRule:
        """Return the same calls, with the outputs of those in `leaving` offloaded."""
        return OpsRule(self.calls, self.routing, leaving, tier)

    @property
    def moves(self) -> OpsRule | None:
        """The rule of the offloaded calls, or None."""
        return OpsRule(self.leaving) if self.leaving else None

    @property
    def text(self) -> str:
        """The calls by op, sorted: equal for equal calls. "" if there are none."""
        by_op: dict[tuple[str, str], list[int]] = {}
        for name, n in sorted(self.calls):
            by_op.setdefault((name, f"@{self.tier}" if (name, n) in self.leaving else ""), []).append(n)
        return "+".join(f"{name}[{_runs(ns)}]{tier}" for (name, tier), ns in by_op.items())

    @property
    def ops(self) -> list[Any]:
        """The overloads that the rule names and torch knows now."""
        names = {name for name, _ in self.calls}
        found = [_find_op(name) for name in sorted(names)]
        kernels = sorted(_SDPA_KERNELS, key=str) if SDPA in names else []
        return [*(op for op in found if op is not None), *kernels]

    def not_among(self, ran: Iterable[Any]) -> str:
        """Return, as text, the calls that the rule names and that did not run; "" if all did. `ran`: ops in the order of their calls."""
        counts: dict[str, int] = {}
        for op in ran:
            for name in {op_name(op), portable_name(op)}:
                counts[name] = counts.get(name, 0) + 1
        return OpsRule(frozenset((name, n) for name, n in self.calls if n >= counts.get(name, 0))).text

    def __call__(self, op: Any, n: int) -> bool:
        """See `Rule`."""
        named = (op_name(op), n) in self.calls or (portable_name(op), n) in self.calls
        return named or (self.routing and op in ROUTING)

    def kind_of(self, op: Any) -> Any:
        """Count each op by itself, matmuls too; the kernels of attention together, if the rule names them so."""
        return SDPA if op in _SDPA_KERNELS and any(name == SDPA for name, _ in self.calls) else op


TIERS = "host", "disk"  # where tensors may be offloaded to
_RUN = r"\d{1,6}(-\d{1,6})?"
_CALLS = re.compile(
    rf"(?P<op>((?P<ns>\w+)::)?\w+(\.\w+)?)\[(?P<calls>{_RUN}(,{_RUN})*)\](@(?P<tier>{'|'.join(TIERS)}))?", re.ASCII
)
_TORCHS = ("aten", "prims")


def consecutive(numbers: Iterable[int]) -> list[list[int]]:
    """Split ascending numbers into runs without a gap."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs


def _runs(numbers: list[int]) -> str:
    """Write ascending numbers; three or more in a row as `first-last`."""
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in consecutive(numbers))


@functools.cache
def op_name(op: Any) -> str:
    """Return an op's short name: `mm`, `max.dim`, `library::op.overload`. Aten and the default overload are left out."""
    name = op._schema.name.removeprefix("aten::")
    return name if op._overloadname == "default" else f"{name}.{op._overloadname}"


def portable_name(op: Any) -> str:
    """Return an op's short name; of a kernel that `scaled_dot_product_attention` may run, that name."""
    return SDPA if op in _SDPA_KERNELS else op_name(op)


def _find_op(name: str) -> Any:
    space, _, rest = name.rpartition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, space or "aten"), packet, None), overload or "default", None)


def kind_of(op: Any, rule: Rule) -> Any:
    """Return the key that calls are counted by: all matmuls together, other ops each by itself, unless the rule has its own."""
    own = getattr(rule, "kind_of", None)
    if own is not None:
        return own(op)
    return "matmul" if op in MATMUL else op


@functools.cache
def level_rule(level: str, routing: bool = True) -> LevelRule:
    """Return the rule of a level."""
    return LevelRule(level, routing)


@functools.cache
def named_rule(name: str, routing: bool = True) -> LevelRule | OpsRule:
    """Return the rule of a level, of "" (routing outputs only), or of single calls; ValueError if the name is neither."""
    return level_rule(name, routing) if not name or name in LEVELS else OpsRule.from_text(name, routing)


def rule_of(keep: Keep) -> Rule:
    """Return the rule that a `keep=` argument names.

    Raises:
        ArgumentError: it names none.
    """
    if isinstance(keep, OpsRule):
        return _in_memory(keep)
    if isinstance(keep, str):
        if keep not in LEVELS and "[" not in keep:
            raise ArgumentError(
                f"keep={keep!r}: expected one of {', '.join(map(repr, LEVELS))}, calls of ops such as 'mm[0,2]+gelu[0]', "
                "ops, or a callable"
            )
        try:
            rule = named_rule(keep)
        except ValueError as error:
            raise ArgumentError(f"keep: {error}") from None
        return _in_memory(rule) if isinstance(rule, OpsRule) else rule
    if callable(keep):
        return CallableRule(keep)
    if isinstance(keep, Collection):
        return _of_ops(frozenset(_op(o) for o in keep))
    raise ArgumentError(
        f"keep: expected a level's name, a collection of op overloads or a callable, got {type(keep).__name__}"
    )


def _in_memory(rule: OpsRule) -> OpsRule:
    if rule.leaving:
        raise ArgumentError(
            f"keep={rule.text!r}: only a plan offloads tensors (`plan(..., host_budget=)`, `disk_directory=`); leave `@{rule.tier}` out"
        )
    return rule


@functools.cache
def _of_ops(ops: frozenset[Any]) -> Rule:
    return lambda op, n: op in ops


def _op(op: Any) -> Any:
    if isinstance(op, OpOverload):
        return op
    hint = f"; did you mean {op}.default?" if isinstance(op, OpOverloadPacket) else ""
    raise ArgumentError(f"keep: {op!r} is not an op overload such as torch.ops.aten.mm.default{hint}")


def torch_contexts(keep: Keep) -> Callable[[], tuple[Any, Any]]:
    """Return torch's selective contexts with the nearest policy, for `torch.compile`: it keeps op outputs, not saved tensors.

    Dynamo can't trace a policy that counts calls. So "half_matmul_attention" keeps all matmuls, and single calls of an op
    become all its calls.
    """
    if isinstance(keep, str) and keep == "half_matmul_attention":
        keep = "matmul_attention"
    if isinstance(keep, OpsRule):
        keep = _ops_of(keep)
    elif isinstance(keep, str):
        keep = _LEVEL_OPS[keep] if keep in _LEVEL_OPS else _ops_of(keep)
    if callable(keep):
        return functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, keep))
    return functools.partial(create_selective_checkpoint_contexts, list(keep))


def _ops_of(keep: str | OpsRule) -> frozenset[Any]:
    rule = OpsRule.from_text(keep) if isinstance(keep, str) else keep
    return frozenset([*rule.ops, *ROUTING])


# `torch.compiler.assume_constant_result` sets this mark, too, but imports Dynamo for it: 1.4 s of processor time and 840 modules.
_ops_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _policy(keep: Callable[[Any], bool], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep(op) else CheckpointPolicy.PREFER_RECOMPUTE


_LEVEL_OPS = {"matmul_attention": [*MATMUL, *ATTENTION, *ROUTING], "attention": [*ATTENTION, *ROUTING]}
