"""The report of a run: what it shows beside scores, and one HTML file that needs nothing beside it."""

from ubp_fast.report.clients import portray
from ubp_fast.report.data import data_read
from ubp_fast.report.drift import drift
from ubp_fast.report.html import RunSummary, Timing, render_report

__all__ = ["RunSummary", "Timing", "data_read", "drift", "portray", "render_report"]
