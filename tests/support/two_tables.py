"""A model with two tables, batches for it, and all that an optimizer made of it: row-sparse against dense."""

from __future__ import annotations

import torch
from schedulefree import RAdamScheduleFree
from torch import Tensor, nn
from torch.optim import Optimizer

ROWS, WIDTH, IDS = 500, 12, 40
# What an optimizer in float32 multiplies by, so that it and one in float64 follow the same rule.
FLOAT_BETAS = tuple(torch.tensor((0.9, 0.999)).tolist())
Batch = tuple[Tensor, Tensor]


class TwoTables(nn.Module):
    """Two tables, one with a padding row, and a dense layer."""

    def __init__(self, table: type[nn.Embedding], dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = table(ROWS, WIDTH)
        self.second = table(ROWS // 2, WIDTH, padding_idx=0)
        self.linear = nn.Linear(WIDTH, 4)
        self.to(dtype)  # drawn in float32, so that every dtype starts from the same weights

    def loss(self, batch: Batch, uses_second: bool = True) -> Tensor:
        ids, noise = batch
        vectors = self.first(ids)
        if uses_second:
            vectors = vectors + self.second(ids // 2) + self.second(ids // 5)
        return (self.linear(vectors.tanh()) * noise).sum()


def batches(count: int, dtype: torch.dtype) -> list[Batch]:
    """Zipf-distributed ids: P(rank) ~ 1 / rank."""
    generator = torch.Generator().manual_seed(3)
    result = []
    for _ in range(count):
        uniform = torch.rand(IDS, generator=generator, dtype=torch.float64)
        ids = (ROWS**uniform).long().clamp(max=ROWS - 1)
        result.append((ids, torch.randn(IDS, 4, generator=generator).to(dtype)))
    return result


def take_steps(model: TwoTables, optimizer: Optimizer, part: list[Batch], uses_second: bool = True) -> None:
    if isinstance(optimizer, RAdamScheduleFree):
        optimizer.train()
    for batch in part:
        optimizer.zero_grad()
        model.loss(batch, uses_second).backward()
        optimizer.step()


def everything(model: TwoTables, optimizer: Optimizer) -> dict[str, Tensor]:
    """All weights and all of the optimizer's tensors."""
    state = optimizer.state_dict()["state"]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return values | {f"{index} {name}": value.clone() for index in state for name, value in state[index].items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal to rounding in float64."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest magnitude."""
    wanted = wanted.double()
    return float((found.double() - wanted).abs().max() / wanted.abs().max())
