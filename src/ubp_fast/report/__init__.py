"""The report of a run: one HTML file that needs nothing beside it."""

from ubp_fast.report.figures import loss_figure, score_figure
from ubp_fast.report.html import RunSummary, render_report

__all__ = ["RunSummary", "loss_figure", "render_report", "score_figure"]
