"""`Baseline`: what a workload took when it was last accepted, small enough to lie in a repository."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ullage._errors import PlanError
from ullage._files import write_whole
from ullage.planner import Holding
from ullage.report._timeline import Timeline

VERSION = 1


class StepFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A step's peak (bytes, moment, bytes by category and unit) and its time."""

    peak_bytes: int
    step_seconds: float
    step: str
    phase: str
    module: str
    op: str
    source: str
    by_category: dict[str, int]
    holdings: list[Holding]

    @classmethod
    def of(cls, t: Timeline) -> StepFacts:
        """Take the facts of a timeline."""
        at = t.peak
        return cls(
            peak_bytes=t.peak_bytes,
            step_seconds=t.step_seconds,
            step=at.step,
            phase=at.phase,
            module=at.module,
            op=at.op,
            source=at.source,
            by_category=dict(sorted(at.by_category.items(), key=lambda row: -row[1])),
            holdings=t.holdings(units=True),
        )


class UnitState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A unit's class, the bytes that one micro-batch saves in it in the plain step, and its option."""

    class_name: str
    saved_bytes: int
    action: str


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Facts that a later check is compared with.

    Attributes:
        version: of the file's format.
        device: name of the device.
        costs: "measured" or "roofline".
        plain: the plain step.
        planned: the step under the plan or within the budget; None if there is neither, or if no plan fits.
        units: class, saved bytes and action of each unit, by its name.
        environment: versions of ullage, torch and Python.
    """

    version: int
    device: str
    costs: str
    plain: StepFacts
    planned: StepFacts | None
    units: dict[str, UnitState]
    environment: dict[str, str]

    @property
    def judged(self) -> StepFacts:
        """The step that is judged: the planned one if there is one."""
        return self.planned or self.plain

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Baseline:
        """Read a baseline; PlanError if it is not one, or of another version."""
        try:
            found = msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except FileNotFoundError as error:
            raise PlanError(f"baseline {path}: there is none; write it with `ullage check --update`") from error
        except (OSError, msgspec.DecodeError) as error:
            raise PlanError(f"baseline {path}: {error}") from error
        if found.version != VERSION:
            raise PlanError(f"baseline {path}: version {found.version}, but this ullage reads {VERSION}; --update it")
        return found
