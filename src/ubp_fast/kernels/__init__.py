"""Kernels that are useful alone: each with one public function, one plain reference, and faster backends.

`backend="auto"` takes the first backend that supports the problem, in the order the operator's `api.py` writes down.
A named backend works or raises `BackendUnavailable` with its reason.
"""

from __future__ import annotations

from ubp_fast.kernels.backends import BackendUnavailable
from ubp_fast.kernels.flash_attention import flash_attention
from ubp_fast.kernels.nt_xent import NTXentLoss, nt_xent
from ubp_fast.kernels.windowed_aggregate import windowed_aggregate

__all__ = ["BackendUnavailable", "NTXentLoss", "flash_attention", "nt_xent", "windowed_aggregate"]
