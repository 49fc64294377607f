"""Units rebuilt together: a unit whose input is the output of the unit before does not keep it: backward runs that unit again.

What backward asks of the last unit of a run starts a sweep: from the nearest unit whose input is there, forward through the
run. On its way it leaves inputs (so that earlier units need no sweep from the start) and, where the plan says so, all
that a unit saves. Runs may lie in runs to any depth, which `Place` writes as two numbers per unit.

    depth   0    1    1    2    2    0            runs: [u0 [u1] [u2 u3 u4]] [u5]
            u0   u1   u2   u3   u4   u5           u0 and u5 hold their inputs from forward on
    sweep to u4 from u0 leaves the inputs of u1, u2, u3, u4

A sweep runs under grad mode as the forward did (kernels and draws depend on it), with hooks that keep nothing.

Source: nested checkpoints as in Griewank & Walther, "Revolve" (ACM TOMS 26, 2000), and Beaumont et al., "Rotor" (2019).
"""

from __future__ import annotations

from ullage._torch import tree_flatten
from ullage.runtime.ambient._local import quiet
from ullage.runtime.replay._replay import run_again
from ullage.runtime.unit._call import Call


def make_inputs(frame: Call, recording: bool) -> None:
    """The sweep that gives a frame its input. `recording`: what is saved on the way may be kept.

    Raises:
        ReplayError: a unit on the way reads something that has changed.
    """
    path = [frame]
    while path[-1].previous is not None:
        path.append(path[-1].previous)
    path.reverse()
    depths = [f.place.depth for f in path]
    last = len(path) - 1
    for k, (unit, following) in enumerate(zip(path, path[1:], strict=False)):
        # seen from the sweep's end: nothing that lies outside its run comes after it
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
