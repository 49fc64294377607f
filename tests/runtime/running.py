"""Runs a program plain, under torch's checkpoint and under ullage's, and says what differs."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.runtime import program_units
from tests.runtime.program_steps import reset, step
from tests.runtime.program_units import Unit
from tests.runtime.programs import Program
from ullage._errors import ReplayError, UllageError, UllageWarning
from ullage.runtime.forward import _learn
from ullage.runtime.forward._frame import Frame
from ullage.runtime.ops import _select
from ullage.runtime.replay import _replay
from ullage.runtime.replay._skip import Stale
from ullage.runtime.unit._site import Site

STEPS = 3


@dataclass
class Outcome:
    """What a run gave, step by step, or the error that ended it."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None
    warned: list[str] = field(default_factory=list)
    told: set[int] = field(default_factory=set)  # steps in which ullage warned that values may differ


@dataclass
class Verdict:
    """What became of a program.

    Attributes:
        kind: "equal", or
            "mismatch": ullage's step is not the plain one;
            "raises": ullage raises where plain and torch's checkpoint run;
            "silent": ullage runs where plain and torch's checkpoint raise, and gives something else than plain does when it saves copies;
            "leak": something is left alive;
            "lenient": ullage runs where plain raises, and gives what plain does when it saves copies;
            "warned": not the plain step, and an `UllageWarning` in that very step says that values may differ;
            "unforeseen": a ReplayError says that a call wrote what the first call did not; it is prepared from then on;
            "refused": ullage raises its own error where plain runs, and torch's checkpoint raises or gives something else, or the error
                names what has changed since the forward;
            "invalid": plain raises, and so does ullage, or it gives what torch's gives.
        what: details.
        torch: "equal", "mismatch" or "raises": torch's checkpoint.
        selective: selective sites where what can be kept lets a replay skip an op, and where nothing that a call read had changed
            when it was replayed; of programs that run to their end.
        skipped: of these, how many skipped ops.
        replays: units run again, all steps.
        idle: the sites that skipped nothing.
    """

    kind: str
    what: str = ""
    torch: str = "equal"
    selective: int = 0
    skipped: int = 0
    replays: int = 0
    warned: tuple[str, ...] = ()
    idle: list[Site] = field(default_factory=list)

    @property
    def defect(self) -> bool:
        return self.kind in ("mismatch", "raises", "silent", "leak") or (self.kind, self.torch) == (
            "unforeseen",
            "equal",
        )


def run(program: Program, mode: str, like: Unit | None = None) -> tuple[Outcome, Unit]:
    """Three steps from the program's own initial state."""
    outcome = Outcome()
    model = Unit(program.top, program.frozen, like=like)
    program_units.mode[0] = mode
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            for number in range(STEPS):
                before = len(warned)
                try:
                    outcome.steps.append(step(program, model, number))
                finally:
                    if any(_owns_up(w) for w in warned[before:]):
                        outcome.told.add(number)
        except (Exception, Stale) as error:
            outcome.error = error.with_traceback(None)
            error.__context__ = error.__cause__ = None
        finally:
            program_units.mode[0] = "plain"
            reset()
    outcome.warned = [str(w.message) for w in warned]
    return outcome, model


def _owns_up(warned: warnings.WarningMessage) -> bool:
    """Does it say that something may be wrong? That activations are kept is no excuse for other bits."""
    return issubclass(warned.category, UllageWarning) and "may differ" in str(warned.message)


def same(a: Any, b: Any) -> bool:
    """The same bits?"""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and _bytes(a) == _bytes(b)
    return type(a) is type(b) and bool(a == b)


def _bytes(t: Tensor) -> bytes:
    t = t.detach().contiguous()
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy().tobytes()


def difference(plain: Outcome, other: Outcome) -> str:
    """The first thing in which a run is not the plain one, or ""."""
    for n, (a, b) in enumerate(zip(plain.steps, other.steps, strict=False)):
        for name in (*a, *(k for k in b if k not in a)):
            # what plain has not made yet may be there already, untouched
            if name in a and (name not in b or not same(a[name], b[name])):
                return f"step {n}: {name}"
            if name not in a and name.startswith("grad of") and b[name] is not None:
                return f"step {n}: {name} is not None"
    return ""


# a unit of which the op log says so is always replayed in full, as the documents say
FULL = ("a subclass of Tensor", "not strided", "gives a tensor other memory, which no op shows")


@contextlib.contextmanager
def watching(found: dict[int, tuple[Site, bool]], asked: set[int]) -> Iterator[None]:
    """Notes every site that learns, whether its rule named something that can be kept, and which sites had a whole call to replay as it was."""
    selection, usable = _learn._selection, _replay._usable

    def noting(frame: Frame, recorder: Any) -> Any:
        refusal, recorder.log.refusal = recorder.log.refusal, ""
        can = _select.selection_of(recorder.log, frame.options.rule).skipped > 0  # type: ignore[arg-type]
        recorder.log.refusal = refusal
        can &= not refusal.endswith(FULL)
        known = found.get(id(frame.site), (frame.site, False))[1]
        found[id(frame.site)] = (frame.site, known or can)
        return selection(frame, recorder)

    def noting_asked(frame: Frame) -> Any:
        if frame.known is not None and frame.complete:
            asked.add(id(frame.site))
        return usable(frame)

    _learn._selection, _replay._usable = noting, noting_asked
    try:
        yield
    finally:
        _learn._selection, _replay._usable = selection, usable


def _saved(t: Tensor) -> tuple[Tensor | None, int, Tensor]:
    return t if t.is_leaf else None, t._version, t.detach().clone()


def _given(saved: tuple[Tensor | None, int, Tensor]) -> Tensor:
    """A copy, as if nobody had written to it; a tensor without a graph is itself, unless that has been: writes through `.data` are seen."""
    leaf, version, copy = saved
    return leaf if leaf is not None and leaf._version == version else copy


def judge(program: Program) -> Verdict:
    """Run a program three ways."""
    found: dict[int, tuple[Site, bool]] = {}
    asked: set[int] = set()
    _, model = run(program, "plain")  # makes the weights
    plain, _ = run(program, "plain", model)
    by_torch, _ = run(program, "torch", model)
    with watching(found, asked):
        by_ullage, _ = run(program, "ullage", model)
    verdict = _verdict(plain, by_torch, by_ullage)
    if verdict.kind == "silent":
        # `allow_mutation_on_saved_tensors` does the same, but not for tensors without a storage
        with torch.autograd.graph.saved_tensors_hooks(_saved, _given):
            meant, _ = run(program, "plain", model)
        if meant.error is None and not difference(meant, by_ullage):
            verdict.kind = "lenient"
        elif len(plain.steps) in by_ullage.told:
            verdict.kind = "warned"
    ran = by_ullage.error is None
    could = [s for s, can in found.values() if ran and can and id(s) in asked]
    verdict.selective, verdict.skipped = len(could), sum(s.skipped > 0 for s in could)
    verdict.idle = [s for s in could if not s.skipped]
    verdict.replays = sum(s.replays for s, _ in found.values())
    verdict.warned = tuple(w for w in by_ullage.warned if w not in plain.warned)
    return verdict


def _verdict(plain: Outcome, by_torch: Outcome, by_ullage: Outcome) -> Verdict:
    theirs = "raises" if by_torch.error else "mismatch" if difference(plain, by_torch) else "equal"
    error = by_ullage.error
    if plain.error is not None:
        if error is not None or not by_torch.error:
            return Verdict("invalid", f"{type(plain.error).__name__}: {plain.error}"[:200], theirs)
        return Verdict("silent", f"plain: {plain.error}; ullage runs"[:300], theirs)
    if error is not None:
        if isinstance(error, UllageError) and "which its first call had left alone" in str(error):
            return Verdict("unforeseen", str(error), theirs)
        # torch's checkpoint takes what is there now, which comes out right only by luck (a scaled tensor's `argmax`)
        named = isinstance(error, ReplayError) and "was changed between forward and backward" in str(error)
        kind = "refused" if (theirs != "equal" or named) and isinstance(error, UllageError) else "raises"
        return Verdict(kind, f"{type(error).__name__}: {error}", theirs)
    what = difference(plain, by_ullage)
    if what and int(what.removeprefix("step ").partition(":")[0]) in by_ullage.told:
        return Verdict("warned", what, theirs)
    return Verdict("mismatch" if what else "equal", what, theirs)


def _torchs_own() -> set[int]:
    """Ids of the jagged tensor that torch makes for itself when a program first has one, and of its parts."""
    dummy = getattr(sys.modules.get("torch.nested._internal.nested_tensor"), "_dummy_instance", None)
    return {id(t) for t in (dummy, getattr(dummy, "_values", None), getattr(dummy, "_offsets", None))}


class Leaks:
    """Counts frames and tensors that outlive a program. `gc.freeze` keeps what was there before out of it."""

    def __enter__(self) -> Leaks:
        importlib.import_module("torch._dynamo")  # some programs load it: then each collection would look at all of it

        gc.collect()
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()

    def left(self) -> str:
        """What is alive that should not be, or ""."""
        gc.collect()
        gc.collect()  # what the first one's finalizers let go of
        objects = gc.get_objects()
        frames = sum(type(o) is Frame for o in objects)
        own = _torchs_own()
        tensors = [o for o in objects if isinstance(o, Tensor) and id(o) not in own]
        sites = sum(type(o) is Site for o in objects)
        if not frames and not tensors:
            return f"{sites} sites" if sites > 200 else ""
        del objects
        gc.freeze()  # once told
        return f"{frames} frames, {[tuple(t.shape) for t in tensors[:5]]} ({len(tensors)} tensors), {sites} sites"


# In "torch, flat" each tensor in a container is an argument of its own. torch's checkpoint saves those, with the hooks of the unit
# around it, as ours saves all tensors: so that unit is held, and with it what it closes over.
LEAKING = ("plain", "torch", "torch, flat")


def _leaks(program: Program, mode: str, leaks: Leaks) -> bool:
    run(program, mode)
    return bool(leaks.left())


def checked(program: Program, leaks: Leaks) -> Verdict:
    """`judge`, and what it leaves behind; a leak does not hide another defect."""
    verdict = judge(program)
    left = leaks.left()
    # after a failed backward the graph still holds what closures hold of it, and no collector sees such a cycle
    if left and verdict.kind == "equal" and not any(_leaks(program, mode, leaks) for mode in LEAKING):
        verdict.kind, verdict.what = "leak", left
    return verdict
