"""The `ullage` command: one file per group of verbs.

A package of its own beside `ullage`, whose import imports torch: what the command line says of itself (help, version, bad usage) takes
click alone, and each verb imports what it runs when it runs.
"""

from ullage_cli._main import main

__all__ = ["main"]
