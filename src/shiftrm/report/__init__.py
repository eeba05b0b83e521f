"""Tables, plots and sentences from records; the page and the summary of a run.

Import `write_report`, `render_page` and `summary` from here.
"""

from shiftrm.report.page import render_page, write_report
from shiftrm.report.terminal import summary

__all__ = ["render_page", "summary", "write_report"]
