"""The `ullage` command: one file per group of verbs."""

from ullage.cli._main import main

__all__ = ["main"]
