"""Contrastive loss of matched rows."""

from ubp_fast.kernels.nt_xent.api import nt_xent
from ubp_fast.kernels.nt_xent.module import NTXentLoss

__all__ = ["NTXentLoss", "nt_xent"]
