"""Which column forecasts a label: the one that, weighing clients by exp(b z), explains best which of them have it.

Of few clients with a label (n of N; standardised columns z) the logarithm of the likelihood of these n, each drawn with
a chance that goes with exp(b z), is n (b m - log mean exp(b z)) more than without the column, m the mean of z among
them. Its maximum over b is what a logistic regression on the column alone would tell of rare labels; that of the mean
needs no labels, so all pairs of columns and labels cost little more than their covariances. The correlation, its first
step, trusts columns with long tails too little and those that a few clients stand out in too much.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Slopes that are tried, of both signs, per deviation of a column.
SLOPES = tuple(sign * slope for slope in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0) for sign in (1.0, -1.0))


def log_means(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """log of the mean of exp(b z) for every slope, f64 [slopes, C], of standardised columns, rows [n, C] at a time."""
    sums, count = None, 0
    for block in blocks:
        part = torch.stack([torch.logsumexp(slope * block.double(), dim=0) for slope in SLOPES])
        sums = part if sums is None else torch.logaddexp(sums, part)
        count += len(block)
    if sums is None:
        raise ValueError("log_means: blocks must hold at least one row, got none")
    return sums - torch.log(torch.tensor(float(count), dtype=torch.float64, device=sums.device))


def evidence(away: torch.Tensor, with_label: torch.Tensor, count: int, logarithms: torch.Tensor) -> torch.Tensor:
    """How much each column says of each label, f64 [C, L], in nats per client of the smaller class.

    Args:
        away: f64 [C, L], sum of the standardised column over the clients that have the label.
        with_label: f64 [L], how many have it.
        count: clients.
        logarithms: `log_means` of the columns.
    """
    is_most = with_label > count / 2
    fewer = torch.where(is_most, count - with_label, with_label).clamp_min(1.0)
    mean = torch.where(is_most, -away, away) / fewer
    found = torch.zeros_like(mean)
    for slope, logarithm in zip(SLOPES, logarithms, strict=True):
        torch.maximum(found, torch.add(-logarithm[:, None], mean, alpha=slope), out=found)
    return found
