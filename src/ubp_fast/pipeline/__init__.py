"""The run: its stages in order, their cache, and the directory that holds the results."""

from ubp_fast.pipeline.execute import execute

__all__ = ["execute"]
