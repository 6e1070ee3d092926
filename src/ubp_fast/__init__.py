"""ubp_fast: event logs in, one behavioral profile per client out."""

__version__ = "0.1.0"
