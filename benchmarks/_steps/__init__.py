"""A corpus of training steps, one per idiom, as people write them. `IDIOMS` has them by name; importing this fills it."""

from _steps import batches, factories, models, optimizers, scripts, state, values
from _steps._idiom import IDIOMS, Idiom

__all__ = ["IDIOMS", "Idiom", "batches", "factories", "models", "optimizers", "scripts", "state", "values"]
