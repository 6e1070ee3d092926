"""Attention inside packed sequences."""

from ubp_fast.kernels.flash_attention.api import flash_attention

__all__ = ["flash_attention"]
