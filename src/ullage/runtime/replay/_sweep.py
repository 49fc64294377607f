"""Sweeps: recompute the units of a run together. Inside a run a unit does not hold its input, the output of the unit before.

When backward asks the last unit of a run for a tensor, a sweep starts at the nearest unit whose input is held and goes forward
through the run. On its way it stores inputs (so that earlier units need no sweep from the start) and, where the plan says so, all
saved tensors of a unit. Runs may contain runs to any depth, which `Place` writes as two numbers per unit.

    depth   0    1    1    2    2    0            runs: [u0 [u1] [u2 u3 u4]] [u5]
            u0   u1   u2   u3   u4   u5           u0 and u5 hold their inputs from forward on
    a sweep to u4 from u0 stores the inputs of u1, u2, u3, u4

A sweep runs in grad mode as the forward did (kernels and draws depend on it), with hooks that keep nothing.

Source: nested checkpoints as in Griewank & Walther, "Revolve" (ACM TOMS 26, 2000), and Beaumont et al., "Rotor" (2019).
"""

from __future__ import annotations

from ullage._torch import tree_flatten
from ullage.runtime.ambient._local import quiet
from ullage.runtime.replay._replay import run_again
from ullage.runtime.unit._call import Call


def make_inputs(frame: Call, recording: bool) -> None:
    """Run the sweep that gives a frame its input. `recording`: units on the way may keep their saved tensors.

    Raises:
        ReplayError: a unit on the way reads a tensor that has changed.
    """
    path = [frame]
    while path[-1].previous is not None:
        path.append(path[-1].previous)
    path.reverse()
    depths = [f.place.depth for f in path]
    last = len(path) - 1
    for k, (unit, following) in enumerate(zip(path, path[1:], strict=False)):
        # a unit keeps its saved tensors only if the rest of the path stays within its run
        seen = min(depths[k + 1 :]) >= unit.place.item
        out = run_again(unit, recording and unit.place.records and seen)
        if unit.previous is not None:
            unit.inputs.let_go()
        leaves = tree_flatten(out)[0]
        with quiet():
            following.inputs.receive(leaves)
        del out, leaves
        if k + 1 == last or min(depths[k + 2 :]) >= following.place.depth:
            following.previous = None
