"""Named policies, to compare plans with: each assigns options to units without a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from ullage._errors import ArgumentError
from ullage.capture._units import UnitFacts
from ullage.mechanisms import KEEP, RECOMPUTE, Mechanism, Option, mechanisms


def named_policies(offloads: bool) -> list[str]:
    """Return the policies to show beside a frontier; those that offload only if there is a tier."""
    of_mechanisms = [m.policy for m in mechanisms() if m.policy and (offloads or not m.sends)]
    return list(dict.fromkeys(["none", "every_block", "every_n:2", "sqrt", *of_mechanisms]))


def mechanism_of(policy: str) -> Mechanism | None:
    """Return the mechanism that a policy puts on every block; None for policies that choose among blocks."""
    return next((m for m in mechanisms() if m.policy == policy), None)


def check_policy(policy: str) -> None:
    """Raise ArgumentError for a policy that does not exist, before anything is captured."""
    if policy != "optimal":
        policy_assignment(policy, [], {})


def policy_assignment(
    policy: str, units: Sequence[UnitFacts], options: Mapping[str, list[Option]]
) -> dict[str, Option]:
    """Return the assignment of a named policy.

    - none: keep everything.
    - every_block: recompute every repeated block.
    - every_n:K: recompute every K-th block.
    - sqrt: keep about sqrt(N) evenly spaced blocks of N, recompute the others. (Not `checkpoint_sequential`, nor Chen et al.,
      "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174: these recompute runs of blocks as a group.)
    - selective: in every block keep matmuls, convolutions and attention, recompute the rest. (Korthikanti et al., "Reducing
      Activation Recomputation in Large Transformer Models", arXiv 2205.05198, choose by op too, but recompute attention.)
    - offload: offload all saved tensors of blocks; needs a tier.

    Raises:
        ArgumentError: no such policy.
    """
    blocks = [u.fqn for u in units if u.block] or [u.fqn for u in units]
    every = re.fullmatch(r"every_n:([1-9][0-9]*)", policy)
    wanted: dict[str, Option] = {}
    if (mechanism := mechanism_of(policy)) is not None:
        wanted = {f: mechanism.typical(options[f]) or KEEP for f in blocks}
    elif every:
        wanted = dict.fromkeys(blocks[int(every[1]) - 1 :: int(every[1])], RECOMPUTE)
    elif policy == "sqrt":
        step = max(round(len(blocks) / max(round(math.sqrt(len(blocks))), 1)), 1)
        wanted = {f: RECOMPUTE for i, f in enumerate(blocks) if i % step != step - 1}
    else:
        names = dict.fromkeys(
            ["optimal", "none", "every_block", "every_n:K", "sqrt", *(m.policy for m in mechanisms())]
        )
        raise ArgumentError(f"policy={policy!r}: expected one of {', '.join(filter(None, names))}")
    return {u.fqn: nearest(wanted.get(u.fqn, KEEP), options[u.fqn]) for u in units}


def nearest(option: Option, options: Sequence[Option]) -> Option:
    """Return an option, or its substitute on a unit that can't have it: keep, or else the unit's first option."""
    return next(o for o in (option, KEEP, *options) if o in options)
