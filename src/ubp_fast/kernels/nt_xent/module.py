"""`NTXentLoss`: the loss as a module, for training loops that keep their losses as modules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ubp_fast.kernels.nt_xent.api import nt_xent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NTXentLoss(nn.Module):
    """NT-Xent between two views: `NTXentLoss(temperature=0.1)(left, right)`; see `nt_xent` for every option.

    Args:
        temperature: > 0; the start value where it is learned.
        negatives: "cross", "symmetric" or "simclr".
        normalize: divide every row by its length first.
        learn_temperature: make the logarithm of the temperature a parameter, so that it stays positive.
        backend: "auto" or a name.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        negatives: str = "cross",
        normalize: bool = True,
        learn_temperature: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"NTXentLoss: temperature must be finite and > 0, got {temperature}")
        self.negatives, self.normalize, self.backend = negatives, normalize, backend
        self.fixed_temperature = float(temperature)
        start = torch.tensor(math.log(temperature)) if learn_temperature else None
        self.log_temperature = nn.Parameter(start) if start is not None else None

    @property
    def temperature(self) -> float | Tensor:
        """The fixed number, or the learned value as a 0-d tensor."""
        return self.fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(
        self,
        left: Tensor,
        right: Tensor,
        *,
        weight: Tensor | None = None,
        valid: Tensor | None = None,
        ids: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """0-d loss of two [N, E] views; arguments as in `nt_xent`."""
        return nt_xent(
            left,
            right,
            temperature=self.temperature,
            negatives=self.negatives,
            weight=weight,
            valid=valid,
            ids=ids,
            group=group,
            normalize=self.normalize,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        if self.log_temperature is None:
            return f"temperature={self.fixed_temperature:g}, negatives={self.negatives!r}"
        return f"temperature={math.exp(self.log_temperature.item()):g} (learned), negatives={self.negatives!r}"
