"""Choose exactly which saved tensors of a unit to keep, on the graph of its ops. Numbers in, numbers out: no mechanism, no tensor."""

from ullage.levels._choice import levels
from ullage.levels._unit_graph import graph_of, rule_for

__all__ = ["graph_of", "levels", "rule_for"]
