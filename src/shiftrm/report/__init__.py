"""Plots and HTML pages from records, and the summary that a run prints at its end."""

from shiftrm.report.narrative import terminal_summary
from shiftrm.report.page import write_report

__all__ = ["terminal_summary", "write_report"]
