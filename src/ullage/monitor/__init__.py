"""Watch a training loop: `Monitor`, its records, and the loggers they go to."""

from ullage.monitor._loggers import Logger, MLflowLogger, TensorBoardLogger, WandbLogger
from ullage.monitor._monitor import Monitor
from ullage.monitor._records import Header, StepRecord
from ullage.monitor._step import Step
from ullage.monitor._summary import MonitorSummary

__all__ = [
    "Header",
    "Logger",
    "MLflowLogger",
    "Monitor",
    "MonitorSummary",
    "Step",
    "StepRecord",
    "TensorBoardLogger",
    "WandbLogger",
]
