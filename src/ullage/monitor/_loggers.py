"""Where metrics go beside the file: TensorBoard, Weights & Biases, MLflow, or anything with `log(metrics, step)`.

Each takes the user's own writer or run, which stays open, or makes one, which is closed with the monitor.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ullage._errors import ArgumentError
from ullage.monitor._records import TAGS

STEP = "trainer/global_step"  # as Lightning calls it


@runtime_checkable
class Logger(Protocol):
    """Takes metrics from a monitor. `start(header)` and `close()` are called too, where there are such."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics, by tag, of the steps up to `step`."""


def _missing(package: str, extra: str) -> ArgumentError:
    return ArgumentError(f"loggers: {package} is not installed: pip install 'ullage[{extra}]'")


class TensorBoardLogger:
    """Scalars of TensorBoard.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter` (or any object with its `add_scalar`), or the folder for a new one.

    Raises:
        ArgumentError: tensorboard is not installed, or `writer` is neither.
    """

    def __init__(self, writer: Any) -> None:
        self._own = isinstance(writer, str | Path)
        if self._own:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise _missing("tensorboard", "tensorboard") from None
            writer = SummaryWriter(str(writer))
        elif not callable(getattr(writer, "add_scalar", None)):
            raise ArgumentError(f"writer: expected a SummaryWriter or a folder, got {type(writer).__name__}")
        self.writer = writer

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """A scalar per tag."""
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flush; close the writer if we made it."""
        if self._own:
            self.writer.close()
        else:
            self.writer.flush()


class WandbLogger:
    """A run of Weights & Biases. The step is a metric of its own, `trainer/global_step`, so that other calls of `run.log` don't clash.

    Args:
        run: what `wandb.init` returned, or None for a new one.
        init: arguments of `wandb.init` for that (project, name, mode, ...).

    Raises:
        ArgumentError: wandb is not installed, or `run` is no run, or comes with arguments for a new one.
    """

    def __init__(self, run: Any = None, **init: Any) -> None:
        self._own = run is None
        if run is not None and (init or not callable(getattr(run, "log", None))):
            why = (
                f"{', '.join(init)} is for a new run"
                if init
                else f"expected what wandb.init returned, got {type(run).__name__}"
            )
            raise ArgumentError(f"run: {why}")
        if run is None:
            try:
                import wandb
            except ImportError:
                raise _missing("wandb", "wandb") from None
            run = wandb.init(**init)
        self.run = run

    def start(self, header: Mapping[str, Any]) -> None:
        """Tell the run what our metrics are plotted over; the header goes to its configuration."""
        self.run.define_metric(STEP)
        for tag in TAGS:
            self.run.define_metric(tag, step_metric=STEP)
        self.run.config.update({"ullage": dict(header)}, allow_val_change=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One call."""
        self.run.log({**metrics, STEP: step})

    def close(self) -> None:
        """Finish the run if it is ours."""
        if self._own:
            self.run.finish()


class MLflowLogger:
    """A run of MLflow.

    Args:
        run_id: the run; None: the active one, or a new one if there is none.
        tracking_uri: of the server or folder; None: as `mlflow` is set up.

    Raises:
        ArgumentError: mlflow is not installed.
    """

    def __init__(self, run_id: str | None = None, tracking_uri: str | None = None) -> None:
        try:
            import mlflow
            from mlflow.entities import Metric
        except ImportError:
            raise _missing("mlflow", "mlflow") from None
        self._metric = Metric
        self.client = mlflow.MlflowClient(tracking_uri)
        active = mlflow.active_run() if run_id is None else None
        self._own = run_id is None and active is None
        if run_id is None:
            # experiment "0" is MLflow's default one
            run_id = active.info.run_id if active is not None else self.client.create_run("0").info.run_id
        self.run_id = run_id

    def start(self, header: Mapping[str, Any]) -> None:
        """The header's facts as tags of the run."""
        for name, value in header.items():
            self.client.set_tag(self.run_id, f"ullage.{name}", str(value))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One batch."""
        now = int(time.time() * 1e3)
        self.client.log_batch(
            self.run_id, metrics=[self._metric(tag, value, now, step) for tag, value in metrics.items()]
        )

    def close(self) -> None:
        """End the run if it is ours."""
        if self._own:
            self.client.set_terminated(self.run_id)
