"""One thread per process: the suite runs as fast on two busy cores, and sums have one order."""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # subprocesses too

import torch

torch.set_num_threads(1)
