"""The choice inside a unit: against brute force, op by op against the runtime, and on real units."""

from __future__ import annotations

import itertools
import random
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ullage as ul
from tests.runtime import running
from tests.runtime.programs import random_program
from tests.runtime.steps import bits
from tests.unit_logs import UNITS, Choose, indices_of, log_of, random_log, subsets, unit_of
from ullage.levels import _choice as _within
from ullage.levels import _eliminate
from ullage.levels._choice import Level, levels
from ullage.levels._eliminate import Curve, TooWide, curve_of
from ullage.levels._graph import Graph, Group, OpNode, SavedNode, StorageNode, ValueNode
from ullage.levels._milp import Program
from ullage.levels._unit_graph import graph_of, rule_for
from ullage.runtime import Options, Site, level_rule, run
from ullage.runtime.forward import _learn
from ullage.runtime.ops._log import Log
from ullage.runtime.ops._select import RUN, SKIP, selection_of

US = 1e-6


def _seconds(log: Log, choose: Choose) -> list[float]:
    return [choose(20) * US for _ in log.ops]


def _curve(graph: Graph) -> list[tuple[int, int]]:
    """By brute force: (bytes, microseconds) of all choices that no other is better than."""
    n = len(graph.groups)
    every = [c for k in range(n + 1) for c in itertools.combinations(range(n), k)]
    points = sorted((graph.nbytes(c), round(graph.seconds(frozenset(c)) / US)) for c in every)
    best: list[tuple[int, int]] = []
    for point in points:
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _points(found: tuple[Level, ...]) -> list[tuple[int, int]]:
    return [(level.nbytes, round(level.seconds / US)) for level in found]


def _check_curve(graph: Graph) -> int:
    """All optimal levels are those of the brute force; how many there are."""
    found = levels(graph, count=10**6, negligible=0.0)
    assert all(level.proved for level in found)
    for level in found:
        assert level.nbytes == graph.nbytes(level.kept) and level.seconds == graph.seconds(level.kept)
    assert _points(found) == _curve(graph)
    return len(found)


def _check_curves(seeds: range) -> None:
    curved = 0
    for seed in seeds:
        choose = random.Random(seed).randrange
        log = random_log(choose)
        base = level_rule("", True) if seed % 3 == 0 else None  # routing outputs are kept whatever is chosen
        graph = graph_of(log, _seconds(log, choose), 1 + choose(9), base)
        if len(graph.groups) <= 10:
            curved += _check_curve(graph) > 2
    assert curved > len(seeds) // 20  # most are trivial, some are not


def test_optimal_at_every_number_of_bytes() -> None:
    _check_curves(range(2000))


@pytest.mark.slow
def test_optimal_at_every_number_of_bytes_in_many_units() -> None:
    """Alone tries 40,000 random units by brute force; the faster one tries 2,000."""
    _check_curves(range(2000, 42_000))


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_curves_of_any_unit(data: st.DataObject) -> None:
    def choose(n: int) -> int:
        return data.draw(st.integers(0, n - 1))

    log = random_log(choose, 8)
    graph = graph_of(log, _seconds(log, choose))
    if len(graph.groups) <= 6:
        _check_curve(graph)
    for kept in subsets(graph, choose, 16):
        for g in kept:  # keeping less never runs less
            assert graph.runs(kept) <= graph.runs(kept - {g})
            assert graph.seconds(kept) <= graph.seconds(kept - {g}) + 1e-12


# --- the graph is what the runtime does -----------------------------------------------------------------------------------


def _check_graph(log: Log, choose: Choose, most: int = 64, routing: bool = False) -> int:
    """For many choices: the same saved tensors kept, the same ops run, up to the same end. How many were tried."""
    base = level_rule("", True) if routing else None
    always = selection_of(log, base).kept if base is not None else frozenset[int]()
    graph = graph_of(log, [1.0] * len(log.ops), base=base)
    tried = 0
    for kept in subsets(graph, choose, most):
        selection = selection_of(log, rule_for(graph, kept, routing))
        assert selection.kept == indices_of(log, graph, kept) | always
        assert {k for k, s in enumerate(selection.steps) if s.action == RUN} == graph.runs(kept)
        ran, ends = round(graph.seconds(kept)), range(len(log.ops) + 1)
        done = [sum(s.action == RUN for s in selection.steps[:end]) for end in ends]
        left = [sum(s.action == SKIP for s in selection.steps[:end]) for end in ends]
        assert (ran, selection.skipped) in zip(done, left, strict=True)
        tried += 1
    return tried


@pytest.mark.parametrize("routing", [False, True])
def test_ops_run_as_the_runtime_says(routing: bool) -> None:
    tried = 0
    for seed in range(800):
        choose = random.Random(seed).randrange
        tried += _check_graph(random_log(choose), choose, routing=routing)
    assert tried > 2500


def test_ops_run_as_the_runtime_says_in_real_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[Log] = []
    original = _learn._selection

    def selection(frame: Any, recorder: Any) -> Any:
        logs.append(recorder.log)
        return original(frame, recorder)

    monkeypatch.setattr(_learn, "_selection", selection)
    tried = 0
    for seed in range(40):
        logs.clear()
        running.run(random_program(seed), "ullage")
        choose = random.Random(seed).randrange
        tried += sum(_check_graph(log, choose, 16) for log in logs if not log.refusal)
    assert tried > 350


def test_a_unit_that_may_not_be_skipped_has_no_choice() -> None:
    choose = random.Random(0).randrange
    log = random_log(choose)
    log.refusal = "a reason"
    (only,) = levels(graph_of(log, [US] * len(log.ops)))
    assert (only.kept, only.nbytes, only.seconds) == (frozenset(), 0, pytest.approx(max(log.saved_at) * US))


# --- levels ------------------------------------------------------------------------------------------------------------------


def _chain(sizes: list[int], seconds: list[float]) -> Graph:
    """Each op reads what the one before made; all outputs are saved, the last op's is not kept."""
    n = len(sizes)
    ops = tuple(OpNode(s, (k - 1,) if k else ()) for k, s in enumerate(seconds))
    values = (*(ValueNode((), k, k) for k in range(n)), ValueNode((n,)))
    saved = tuple(SavedNode(k, k + 1, k if k < n else -1) for k in range(n + 1))
    storages = tuple(StorageNode(k, k, k + 1) for k in range(n))
    return Graph(ops, values, storages, saved, tuple(Group(b, ("op", k)) for k, b in enumerate(sizes)))


def test_a_chain_is_a_knapsack() -> None:
    graph = _chain([4, 3, 3], [5 * US, 4 * US, 4 * US, 1 * US])
    assert _points(levels(graph, 99, 0.0)) == [(0, 14), (3, 10), (4, 9), (6, 6), (7, 5), (10, 1)]


def test_what_costs_nothing_to_rebuild_is_not_kept() -> None:
    graph = _chain([4, 3, 3], [5 * US, 0.0, 5e-10, 0.0])
    assert [level.kept for level in levels(graph)] == [frozenset(), {0}]


def test_what_holds_nothing_is_kept() -> None:
    graph = _chain([4, 0, 3], [5 * US, 4 * US, 4 * US, 1 * US])
    assert [(level.kept, level.nbytes) for level in levels(graph)][0] == ({1}, 0)


def test_few_levels_are_on_the_curve_and_split_the_largest_gaps() -> None:
    choose = random.Random(5).randrange
    sizes, seconds = [1 + choose(40) for _ in range(9)], [(1 + choose(30)) * US for _ in range(10)]
    graph = _chain(sizes, seconds)
    curve, few = _curve(graph), _points(levels(graph, count=8))
    assert set(few) <= set(curve) and few[0] == curve[0] and few[-1] == curve[-1] and len(few) == 8 < len(curve)

    def open_area(points: list[tuple[int, int]]) -> int:
        return sum((b[0] - a[0]) * (a[1] - b[1]) for a, b in itertools.pairwise(points))

    evenly = [curve[round(k * (len(curve) - 1) / 7)] for k in range(8)]
    assert open_area(few) <= open_area(evenly)


def test_the_same_unit_has_the_same_levels() -> None:
    choose = random.Random(1).randrange
    graph = _chain([1 + choose(9) for _ in range(20)], [(1 + choose(9)) * US for _ in range(21)])
    assert levels(graph) == levels(graph)


def _dense(choose: Choose, ops: int, reach: int) -> Graph:
    """Each op reads up to three of the `reach` before it; some draw, some outputs are saved."""
    nodes, values, saved, storages, groups = [], [], [], [], []
    for k in range(ops):
        reads = tuple({k - 1 - choose(min(k, reach)) for _ in range(1 + choose(3))}) if k else ()
        nodes.append(OpNode((1 + choose(99)) * US, reads, choose(20) == 19))
        able = choose(5) < 2
        values.append(ValueNode((), k, len(groups)) if able else ValueNode((k,)))
        if able:
            storages.append(StorageNode(len(groups), k, k + 1))
            saved.append(SavedNode(k, k + 1, len(groups)))
            groups.append(Group(1 + choose(1000)))
    saved.append(SavedNode(ops - 1, ops))
    return Graph(tuple(nodes), tuple(values), tuple(storages), tuple(saved), tuple(groups))


def test_both_solvers_agree_on_any_unit() -> None:
    tried = 0
    for seed in range(300):
        choose = random.Random(seed).randrange
        log = random_log(choose, 14)
        graph = graph_of(log, _seconds(log, choose))
        everything = range(len(graph.groups))
        total = graph.nbytes(everything)
        if len(graph.groups) > 2 and graph.seconds(everything) < graph.seconds(()):
            curve, program = curve_of(graph), Program(graph, 1000)
            for limit, price in ((1 + choose(total), 0.0), (None, (1 + choose(10)) * 1e-6)):
                (_, a), (kept, b) = curve.solve(limit, price), program.solve(limit, price)
                assert kept is not None and a == pytest.approx(b, abs=1e-9)
                assert graph.seconds(kept) + price * graph.nbytes(kept) == pytest.approx(a, abs=1e-9)
            tried += 1
    assert tried > 50


def test_without_scipy_the_unit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other levels would make another plan, silently."""
    graph = _dense(random.Random(0).randrange, 50, 5)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert levels(graph)  # by elimination
    monkeypatch.setattr(_eliminate, "MOST_VARIABLES", 0)
    with pytest.raises(ul.ArgumentError, match="needs scipy, which is not installed: `pip install scipy`, or pin"):
        levels(graph)


def test_both_solvers_agree_on_large_units() -> None:
    """On units too large for brute force, where elimination is possible."""
    for seed in range(8):
        choose = random.Random(seed).randrange
        graph = _dense(choose, 50, 5)
        curve, program = curve_of(graph), Program(graph, 1000)
        total = graph.nbytes(range(len(graph.groups)))
        for limit in (total // 5, total // 3, total // 2):
            (_, a), (kept, b) = curve.solve(limit, 0.0), program.solve(limit, 0.0)
            assert kept is not None and graph.nbytes(kept) <= limit
            assert a == pytest.approx(b, abs=1e-9) and graph.seconds(kept) == pytest.approx(a, abs=1e-9)
        for price in (3e-9, 3e-8, 1e-7):
            (_, a), (kept, b) = curve.solve(None, price), program.solve(None, price)
            assert kept is not None and a == pytest.approx(b, abs=1e-9)
            assert graph.seconds(kept) + price * graph.nbytes(kept) == pytest.approx(a, abs=1e-9)


def test_what_is_too_wide_to_eliminate_is_solved_all_the_same() -> None:
    graph = _dense(random.Random(3).randrange, 90, 40)
    with pytest.raises(TooWide):
        curve_of(graph)
    found = levels(graph, 5)
    assert len(found) == 5 and all(level.proved for level in found)
    seconds = [level.seconds for level in found]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] == graph.seconds(range(len(graph.groups)))


def test_without_search_there_are_the_corners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear programs alone find the corners of the convex hull, and prove them."""
    monkeypatch.setattr(_eliminate, "MOST_VARIABLES", 0)
    graph = _chain([4, 3, 3, 2], [5 * US, 4 * US, 4 * US, 1 * US, 0.0])
    found = levels(graph, 99, 0.0, node_limit=0)
    assert {(0, 14), (6, 6), (10, 1), (12, 0)} <= set(_points(found)) <= set(_curve(graph))
    assert all(level.proved for level in found)


def test_what_is_not_proved_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsure(Curve):
        def solve(self, limit: int | None, price: float) -> tuple[frozenset[int], float]:
            kept, value = super().solve(limit, price)
            return kept, value if limit is None else 0.75 * value

    monkeypatch.setattr(_within, "curve_of", lambda graph: Unsure(curve_of(graph).labels))
    found = levels(_chain([4, 3, 3], [5 * US, 4 * US, 4 * US, 1 * US]), 99, 0.0)
    assert _points(found) == [(0, 14), (3, 10), (4, 9), (6, 6), (7, 5), (10, 1)]
    bounds = [round(level.lower_bound / US, 2) for level in found if not level.proved]
    assert bounds == [0.75 * p for p in (14, 10, 9, 5)]


def test_rounding_to_what_the_allocator_gives() -> None:
    module, args, kwargs = unit_of("gpt")
    log = log_of(module, *args, **kwargs)
    exact, rounded = (graph_of(log, [US] * len(log.ops), r) for r in (1, 512))
    assert all(
        b.nbytes % 512 == 0 and 0 <= b.nbytes - a.nbytes < 3 * 512
        for a, b in zip(exact.groups, rounded.groups, strict=True)
    )
    # an attention's output, and its logsumexp
    width = 4 * 128 * 128 * 4
    assert {g.call: g.nbytes for g in exact.groups}["scaled_dot_product_attention", 0] == (width + 4 * 4 * 128 * 4)


# --- real units --------------------------------------------------------------------------------------------------------------


def _step(call: Any, module: Any, args: Any, kwargs: Any) -> Any:
    torch.manual_seed(1)
    module.zero_grad()
    x = args[0].detach().clone().requires_grad_()
    out = call(x, *args[1:], **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    out.double().square().sum().backward()
    return bits(out), bits(x.grad), [bits(p.grad) for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", UNITS)
def test_real_units(family: str) -> None:
    """Each group alone, and many choices, op by op; then some levels for real: bitwise the plain gradients, as many ops skipped as foreseen."""
    module, args, kwargs = unit_of(family)
    log = log_of(module, *args, **kwargs)
    assert _check_graph(log, random.Random(0).randrange, 40, routing=family in ("moe", "mixtral")) == 40 or (
        family == "resnet"
    )
    graph = graph_of(log, [1e-6 * (1 + 20 * bool(op.func in _HEAVY)) for op in log.ops])
    for g in range(len(graph.groups)):
        assert selection_of(log, rule_for(graph, [g])).kept == indices_of(log, graph, [g]) != frozenset()
    found = levels(graph)
    assert len(found) >= 3 and all(level.proved for level in found)
    truth = _step(module, module, args, kwargs)
    for level in (found[1], found[len(found) // 2], found[-1]):
        rule, site = rule_for(graph, level.kept), Site("unit")

        def call(*a: Any, rule: Any = rule, site: Any = site, **k: Any) -> Any:
            return run(site, Options(rule), module, a, k)

        for _ in range(2):
            assert _step(call, module, args, kwargs) == truth
        assert site.skipped == 2 * selection_of(log, rule).skipped and not site.stale


_HEAVY = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
