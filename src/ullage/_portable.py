"""Names of ops that mean the same on every device: the kernels of attention are one op, whose calls are counted together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ullage.runtime import ATTENTION
from ullage.runtime.ops._keep import LevelRule, OpsRule, named_rule, op_name

SDPA = "scaled_dot_product_attention"
_KERNELS = frozenset(op for op in ATTENTION if op_name(op).startswith("_scaled_dot_product_"))


def portable_name(op: Any) -> str:
    """An op's short name; of each kernel that `scaled_dot_product_attention` may run, that name."""
    return SDPA if op in _KERNELS else op_name(op)


class PortableRule(OpsRule):
    """A rule that knows an op by its portable name, so that a plan made on a CPU keeps attention on a GPU, too."""

    def sent(self, tier: str, leaving: frozenset[tuple[str, int]]) -> OpsRule:
        """See `OpsRule.sent`."""
        return PortableRule(self.calls, self.routing, leaving, tier)

    @property
    def moves(self) -> OpsRule | None:
        """See `OpsRule.moves`."""
        return PortableRule(self.leaving) if self.leaving else None

    @property
    def ops(self) -> list[Any]:
        """The overloads that the rule names: of attention every kernel."""
        return [*super().ops, *(sorted(_KERNELS, key=str) if any(name == SDPA for name, _ in self.calls) else [])]

    def not_among(self, ran: Iterable[Any]) -> str:
        """See `OpsRule.not_among`."""
        counts: dict[str, int] = {}
        for op in ran:
            counts[portable_name(op)] = counts.get(portable_name(op), 0) + 1
        return OpsRule(frozenset((name, n) for name, n in self.calls if n >= counts.get(name, 0))).text

    def __call__(self, op: Any, n: int) -> bool:
        """See `Rule`."""
        return (portable_name(op), n) in self.calls or super().__call__(op, n)

    def kind_of(self, op: Any) -> Any:
        """Count the kernels of attention together, other ops each by itself."""
        return SDPA if op in _KERNELS else op


def rule_named(level: str, routing: bool = True) -> LevelRule | OpsRule:
    """The rule of a level's name, as `runtime.ops._keep.named_rule` has it; ValueError if it is none."""
    rule = named_rule(level, routing)
    if isinstance(rule, OpsRule) and any(name == SDPA for name, _ in rule.calls):
        return PortableRule(rule.calls, rule.routing, rule.leaving, rule.tier)
    return rule
