"""keep: the plain step."""

from __future__ import annotations

from ullage.mechanisms._mechanism import Mechanism, Option, register


class Keep(Mechanism):
    """Leave a unit as it is: autograd holds every saved tensor until backward.

    Use it wherever the budget allows: nothing is faster. It saves no memory.
    """

    action = "keep"
    policy = "none"
    is_plain = True


register(Keep())
KEEP = Option(Keep.action)
