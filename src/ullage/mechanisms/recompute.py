"""recompute: run a unit's whole forward again in backward."""

from __future__ import annotations

from ullage.mechanisms._mechanism import HostTimes, Mechanism, Option, Replays, register


class Recompute(Mechanism):
    """Hold only a unit's inputs, and run its whole forward again when backward comes to it.

    Use it if memory is short: a unit then holds one input, or none inside a group of units recomputed together. The step takes
    the time of one more forward of the unit. If part of the forward is dear (attention, matmuls), `select` costs less time.

    Sources: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (arXiv:1604.06174); for units recomputed
    together Griewank and Walther, "Algorithm 799: Revolve", 2000, and Herrmann et al., "Optimal checkpointing for
    heterogeneous chains", 2019 (arXiv:1911.13214).
    """

    action = "recompute"
    policy = "every_block"
    replays = Replays.WHOLE

    def seconds(self, option: Option, host: HostTimes, calls: int, ops: int, again: int | None) -> float:
        """Count a replay per call; among units recomputed together a unit's forward may run several times."""
        if again is not None:
            calls, ops = max(round(again / ops), 1) * calls, again
        return host.replays(False, calls, ops)


register(Recompute())
RECOMPUTE = Option(Recompute.action)
