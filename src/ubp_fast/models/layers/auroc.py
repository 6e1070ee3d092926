"""How well logits rank labels, over any number of clients in constant memory: counts by bins of the logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOGIT_BINS, LARGEST_LOGIT = 4096, 16.0


class BinnedAuroc(nn.Module):
    """Counts of both labels per output and bin, no part of a model's state; logits beyond +-16 are in the last bins."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(2, outputs, LOGIT_BINS, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def add(self, logits: Tensor, label: Tensor, valid: Tensor | None = None) -> None:
        """Counts logits float [B, outputs] and labels of the same shape, 0 or 1, of the rows that are `valid` (all)."""
        outputs = logits.shape[1]
        bins = ((logits.float() / LARGEST_LOGIT + 1) * (LOGIT_BINS / 2)).long().clamp(0, LOGIT_BINS - 1)
        cells = ((label > 0.5).long() * outputs + torch.arange(outputs, device=logits.device)) * LOGIT_BINS + bins
        ones = torch.ones_like(cells) if valid is None else valid[:, None].expand_as(cells).long()
        self.counts.view(-1).index_add_(0, cells.reshape(-1), ones.reshape(-1))

    def take(self) -> float | None:
        """Mean AUROC of the outputs that met both labels (None: no output did), and starts anew."""
        negatives, positives = self.counts.double()
        self.counts.zero_()
        below = negatives.cumsum(1) - negatives / 2
        pairs = positives.sum(1) * negatives.sum(1)
        areas = (positives * below).sum(1)[pairs > 0] / pairs[pairs > 0]
        return float(areas.mean()) if len(areas) else None
