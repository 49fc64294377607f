"""One browser for each file that asks for it."""

from tests.report.browser import browser

__all__ = ["browser"]
