"""BinnedAuroc against all pairs."""

from __future__ import annotations

import pytest
import torch

from ubp_fast.models.layers.auroc import BinnedAuroc


def test_equals_the_share_of_ordered_pairs() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(600, 3), torch.rand(600, 3) < torch.tensor([0.5, 0.1, 0.0])
    logits[labels] += 1
    logits[:5] = 40.0  # beyond the bins
    ranking = BinnedAuroc(3)
    for rows in (slice(0, 250), slice(250, 600)):
        ranking.add(logits[rows], labels[rows].float())
    areas = []
    for values, label in zip(logits.T[:2], labels.T[:2], strict=True):
        ours, others = values[label][:, None], values[~label]
        areas.append(float(((ours > others).float() + (ours == others).float() / 2).mean()))
    assert ranking.take() == pytest.approx(sum(areas) / 2, abs=1e-3)
    assert ranking.take() is None, "it starts anew"
    assert not ranking.state_dict()
