"""A workload: a model, one micro-batch and the course of a step; and loading one from a target."""

from ullage.workload._axis import check_axis, target_along
from ullage.workload._batch import tensors_of
from ullage.workload._copy import copied_parts
from ullage.workload._history import history, missing_history
from ullage.workload._modes import in_evaluation, named, note_of, reads_mode
from ullage.workload._reads import Reads
from ullage.workload._setup import Setup, setup_of
from ullage.workload._step import forward, run_step
from ullage.workload._target import beside_target, load_target
from ullage.workload._workload import Instance, Workload, reading

__all__ = [
    "Instance", "Reads", "Setup", "Workload", "beside_target", "check_axis", "copied_parts", "forward", "history", "in_evaluation", "load_target", "missing_history", "named", "note_of", "reading", "reads_mode", "run_step", "setup_of", "target_along", "tensors_of",
]  # fmt: skip
