"""The organisers' fixed network: client vector -> logits of one task.

    h_0 = LayerNorm(Linear(D -> 2048)(x))
    h_i = h_{i-1} + Linear(4096 -> 2048)(GELU(Linear(2048 -> 4096)(LayerNorm(h_{i-1})))),   i = 1..3
    logits = Linear(2048 -> outputs)(LayerNorm(h_3))

About 50.6 M parameters without the input layer (100 outputs). Parameters are created in the organisers' order, so that
`torch.manual_seed(DOWNSTREAM_SEED)` just before the constructor gives their initial values.
Source: Synerise/recsys2025, training_pipeline.
"""

from __future__ import annotations

import torch
from torch import nn

HIDDEN_DIM = 2048
THIN_DIM = 4096
NUM_BLOCKS = 3
DOWNSTREAM_SEED = 1278


class ResidualBlock(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))): float [B, hidden_dim] -> [B, hidden_dim]."""

    def __init__(self, hidden_dim: int, thin_dim: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.expand = linear(hidden_dim, thin_dim)
        self.activation = nn.GELU()
        self.contract = linear(thin_dim, hidden_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Adds the block's result to its input."""
        return hidden + self.contract(self.activation(self.expand(self.norm(hidden))))


class DownstreamBody(nn.Module):
    """The network up to its last LayerNorm: float [B, input_dim] -> [B, hidden_dim]."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = HIDDEN_DIM,
        thin_dim: int = THIN_DIM,
        num_blocks: int = NUM_BLOCKS,
        linear: type[nn.Linear] = nn.Linear,
    ) -> None:
        """Creates the layers in the organisers' order; `linear` may be a subclass that computes in another way."""
        super().__init__()
        self.input = linear(input_dim, hidden_dim)
        self.input_norm = nn.LayerNorm(hidden_dim)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden_dim, thin_dim, linear) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, profiles: torch.Tensor) -> torch.Tensor:
        """Hidden vectors that a linear head reads."""
        return self.norm(self.blocks(self.input_norm(self.input(profiles))))


class DownstreamNetwork(nn.Module):
    """Body and linear head of one task: float [B, input_dim] -> logits [B, num_outputs]."""

    def __init__(self, input_dim: int, num_outputs: int, linear: type[nn.Linear] = nn.Linear, **sizes: int) -> None:
        """Creates body, then head; `linear` may be a subclass that computes in another way, `sizes` are the body's."""
        super().__init__()
        self.body = DownstreamBody(input_dim, linear=linear, **sizes)
        self.head = linear(self.body.norm.normalized_shape[0], num_outputs)

    def forward(self, profiles: torch.Tensor) -> torch.Tensor:
        """Logits; no sigmoid."""
        return self.head(self.body(profiles))
