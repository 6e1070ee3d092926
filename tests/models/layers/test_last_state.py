"""The packed LSTM against `nn.LSTM` on each sequence alone: states and every gradient."""

from __future__ import annotations

import pytest
import torch
from support.closeness import assert_matches_reference
from torch import Tensor, nn

from ubp_fast.models.layers.last_state import LastStatePooling
from ubp_fast.sequences import SequenceBatch

WIDTH = 7


def batch_of(lengths: list[int]) -> SequenceBatch:
    """Sequences of such lengths; nothing but the lengths is read."""
    count = sum(lengths)
    nothing = torch.zeros(count, dtype=torch.int64)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    clients = torch.arange(len(lengths))
    return SequenceBatch(
        kind=nothing + 1, sku=nothing, category=nothing, price=nothing, url=nothing,
        codes=torch.zeros(count, 16, dtype=torch.int64), timestamp_s=nothing, cu_seqlens=bounds,
        cutoff_s=torch.ones_like(clients), client=clients,
    )  # fmt: skip


def alone(pooling: LastStatePooling, rows: Tensor, lengths: list[int]) -> Tensor:
    """torch's LSTM with the same weights, sequence by sequence; zeros where there is no event."""
    weights = {f"{name}_l0": value for name, value in pooling.cell.named_parameters()}
    lstm = nn.LSTM(WIDTH, WIDTH, dtype=rows.dtype)
    parts = [
        torch.func.functional_call(lstm, weights, part)[0][-1] if len(part) else part.new_zeros(WIDTH)
        for part in rows.split(lengths)
    ]
    return torch.stack(parts)


@pytest.mark.parametrize("own_on", [("cpu",), ()], ids=["own", "library"])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 2], [4, 0, 4, 1], [2, 5, 5, 0, 9, 1, 1]], ids=str)
def test_states_and_gradients(lengths: list[int], own_on: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    rows, upstream = torch.randn(sum(lengths), WIDTH), torch.randn(len(lengths), WIDTH)

    def everything(dtype: torch.dtype, is_packed: bool) -> list[Tensor]:
        torch.manual_seed(1)
        pooling, inputs = LastStatePooling(WIDTH, own_on).to(dtype), rows.to(dtype).requires_grad_()
        states = pooling(inputs, batch_of(lengths)) if is_packed else alone(pooling, inputs, lengths)
        gradients = torch.autograd.grad(states, (inputs, *pooling.parameters()), upstream.to(dtype))
        return [states.detach().to(dtype), *gradients]

    truth, plain = everything(torch.float64, False), everything(torch.float32, False)
    found = everything(torch.float32, True)
    for index, three in enumerate(zip(found, plain, truth, strict=True)):
        assert_matches_reference(*three, "LastStatePooling", (lengths, index))


def test_autocast_rounds_only_what_enters() -> None:
    torch.manual_seed(0)
    lengths = [2, 5, 1]
    pooling, rows = LastStatePooling(WIDTH), torch.randn(sum(lengths), WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        found = pooling(rows, batch_of(lengths))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, alone(pooling, rows, lengths), rtol=0.02, atol=0.02)


def test_operators_are_sound() -> None:
    """Schema, what is known of results before they are computed, autograd, and PyTorch's compiler with any shape."""
    inputs, weight = torch.randn(6, 4 * WIDTH, requires_grad=True), torch.randn(4 * WIDTH, WIDTH, requires_grad=True)
    position = torch.tensor([0, 1, 0, 2, 1, 0])
    torch.library.opcheck(torch.ops.ubp_fast.last_states.default, (inputs, weight, position, 4))
    with torch.no_grad():
        _, *saved = torch.ops.ubp_fast.last_states(inputs, weight, position, 4)
    given = (torch.randn(4, WIDTH), weight.detach(), position, *saved)
    torch.library.opcheck(torch.ops.ubp_fast.last_states_backward.default, given)
