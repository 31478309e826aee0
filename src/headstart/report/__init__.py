"""One HTML file that shows a comparison: opens offline, asks for nothing, built from files alone."""

from headstart.report.page import write

__all__ = ["write"]
