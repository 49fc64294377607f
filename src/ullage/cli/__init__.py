"""The command `ullage`, which is `ullage_cli`: that package can tell its help without importing torch, as no part of this one can."""

from ullage_cli import main

__all__ = ["main"]
