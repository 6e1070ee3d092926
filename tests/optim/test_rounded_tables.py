"""Tables in bfloat16 whose steps are rounded at random: unbiased, the same for a seed, and nothing stalls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from schedulefree import RAdamScheduleFree
from torch import Tensor, nn

from ubp_fast.optim import RowSparseAdamW, RowSparseEmbedding, RowSparseRAdamScheduleFree, adopt_tables
from ubp_fast.optim.touched_rows import round_at_random

ROWS, WIDTH = 60, 16
OPTIMIZERS = {"schedule free": RowSparseRAdamScheduleFree, "adamw": RowSparseAdamW}
Optimizer = RowSparseRAdamScheduleFree | RowSparseAdamW


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    name: str, dtype: torch.dtype = torch.bfloat16, rows: int = ROWS, seed: int = 0, **options: Any
) -> tuple[RowSparseEmbedding, Optimizer]:
    torch.manual_seed(seed)
    table = RowSparseEmbedding(rows, WIDTH, dtype=dtype)
    with torch.no_grad():
        table.weight.copy_(torch.randn(rows, WIDTH, generator=generator(7)).bfloat16())
    return table, OPTIMIZERS[name]([table.weight], [table], **{"lr": 1e-2, **options})


def set_mode(optimizer: Optimizer, is_training: bool) -> None:
    if isinstance(optimizer, RAdamScheduleFree):
        optimizer.train() if is_training else optimizer.eval()


def take_steps(table: RowSparseEmbedding, optimizer: Optimizer, start: int, end: int) -> None:
    set_mode(optimizer, True)
    for step in range(start, end):
        draw = generator(step)
        ids = torch.randint(0, len(table.weight) // 2, (20,), generator=draw)
        optimizer.zero_grad()
        (table(ids) * torch.randn(20, WIDTH, generator=draw)).sum().backward()
        (table(ids[:5]) ** 2).sum().backward()
        optimizer.step()


def everything(table: RowSparseEmbedding, optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"][0]
    return {"weight": table.state_dict()["weight"].clone(), **{name: value.clone() for name, value in state.items()}}


def test_rounding_takes_a_neighbour_and_is_unbiased() -> None:
    values = torch.tensor([1 + 2**-9, -1 - 3 * 2**-10, 3.14159, -1e-3, 2.0**-130 + 2.0**-134, 65504.0])
    drawn = round_at_random(values.expand(40_000, -1), generator()).float()
    for column, value in zip(drawn.unbind(1), values.tolist(), strict=True):
        lower, upper = sorted(column.unique().tolist())
        assert lower < value < upper
        assert torch.tensor(upper).bfloat16() == upper and torch.tensor(lower).bfloat16() == lower
        chance = (value - lower) / (upper - lower)
        # Five standard deviations of the share that went up.
        assert abs((column == upper).double().mean() - chance) < 5 * (chance * (1 - chance) / 40_000) ** 0.5


def test_rounding_keeps_what_bfloat16_holds() -> None:
    values = torch.cat([torch.randn(1000).bfloat16().float(), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
    assert torch.equal(round_at_random(values, generator()).float(), values)
    assert round_at_random(torch.tensor([torch.nan] * 100), generator()).isnan().all()
    assert round_at_random(torch.empty(0, 3), generator()).shape == (0, 3)


def test_neighbouring_columns_and_rows_are_rounded_independently() -> None:
    up = (round_at_random(torch.full((2000, 8), 1 + 2**-8), generator()) > 1).double()
    for left in range(8):
        for right in range(left):
            assert abs(torch.corrcoef(up[:, [left, right]].T)[0, 1]) < 5 / 2000**0.5
    assert abs(torch.corrcoef(torch.stack([up[1:, 0], up[:-1, 0]]))[0, 1]) < 5 / 2000**0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lookups_are_float32_and_state_is_that_of_touched_rows(name: str) -> None:
    table, optimizer = make(name)
    take_steps(table, optimizer, 0, 5)
    assert table.weight.dtype == torch.bfloat16
    assert table.touched.state.dtype == torch.float32
    assert 0 < int(table.touched.used) <= ROWS // 2
    vectors = table(torch.tensor([[0, 1, 59], [1, 1, 2]]))
    assert vectors.shape == (2, 3, WIDTH) and vectors.dtype == torch.float32
    assert torch.equal(vectors[0, 1], vectors[1, 0])
    set_mode(optimizer, False)
    table.catch_up()
    assert torch.equal(table(torch.arange(ROWS)), table.weight.float())
    table.release()
    assert torch.equal(table(torch.arange(ROWS)), table.weight.float())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mean_of_many_tables_is_the_float32_one(name: str) -> None:
    """The rows of one table take the same steps from the same weight: their mean is the result without rounding."""
    rows = 4096
    results = {}
    for dtype in (torch.bfloat16, torch.float32):
        table, optimizer = make(name, dtype, rows, lr=1e-3)
        with torch.no_grad():
            table.weight.fill_(1.0)
        set_mode(optimizer, True)
        for step in range(40):
            optimizer.zero_grad()
            gradient = torch.randn(WIDTH, generator=generator(step)) + 0.5
            (table(torch.arange(step % 2, rows, 2)) * gradient).sum().backward()
            optimizer.step()
        set_mode(optimizer, False)
        results[dtype] = table.state_dict()["weight"].double()
    for parity in range(2):
        found, wanted = (results[dtype][parity::2] for dtype in (torch.bfloat16, torch.float32))
        spread = found.std(dim=0)
        assert (spread > 0).all()
        # Gradients, too, come in bfloat16, to the nearest: a part in 256 of the way.
        room = 5 * spread / len(found) ** 0.5 + (wanted[0] - 1).abs() / 100
        assert ((found.mean(dim=0) - wanted[0]).abs() < room).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_steps_are_not_lost(name: str) -> None:
    """100 steps of 1e-4 from 1, whose neighbours are 2^-8 and more away: to the nearest, none of them counts."""
    rows, moved = 600, []

    def train(table: nn.Embedding, optimizer: Any) -> float:
        with torch.no_grad():
            table.weight.fill_(1.0)
        set_mode(optimizer, True)
        for _ in range(100):
            optimizer.zero_grad()
            table(torch.arange(rows)).sum().backward()
            optimizer.step()
        set_mode(optimizer, False)
        return float(1 - table.state_dict()["weight"].double().mean())

    for dtype in (torch.bfloat16, torch.float32):
        moved.append(train(*make(name, dtype, rows, lr=1e-4)))
    assert moved[1] > 2e-4
    # A share of the weights lies one neighbour lower: five standard deviations of its mean.
    assert abs(moved[0] - moved[1]) < 5 * (2**-8 * moved[1] / (rows * WIDTH)) ** 0.5
    plain = nn.Embedding(rows, WIDTH, dtype=torch.bfloat16)
    assert train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)) == 0.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_seed_same_bytes_for_any_number_of_threads(name: str) -> None:
    results = []
    for threads, seed in ((1, 0), (2, 0), (1, 1)):
        torch.set_num_threads(threads)
        table, optimizer = make(name, seed=seed)
        take_steps(table, optimizer, 0, 30)
        results.append(everything(table, optimizer))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
    assert not torch.equal(results[0]["weight"], results[2]["weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_and_loaded_in_the_middle_gives_the_same_bytes(name: str) -> None:
    table, optimizer = make(name)
    take_steps(table, optimizer, 0, 15)
    set_mode(optimizer, False)
    weights, state = copy.deepcopy(table.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert state["state"][0]["rounding"].tolist()[1] > 0
    assert all(state["state"][0][part].dtype == torch.float32 for part in table.touched.names)
    take_steps(table, optimizer, 15, 30)
    other, other_optimizer = make(name, seed=3)
    other.load_state_dict(weights)
    other_optimizer.load_state_dict(state)
    take_steps(other, other_optimizer, 15, 30)
    wanted, found = everything(table, optimizer), everything(other, other_optimizer)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert torch.equal(value, found[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_and_bfloat16_load_each_other(name: str) -> None:
    for source, target in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        table, optimizer = make(name, source)
        take_steps(table, optimizer, 0, 10)
        set_mode(optimizer, False)
        other, other_optimizer = make(name, target)
        other.load_state_dict(table.state_dict())
        other_optimizer.load_state_dict(optimizer.state_dict())
        take_steps(table, optimizer, 10, 20)
        take_steps(other, other_optimizer, 10, 20)
        set_mode(optimizer, False)
        set_mode(other_optimizer, False)
        found, wanted = other.state_dict()["weight"].float(), table.state_dict()["weight"].float()
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_weight_decay_reaches_rows_without_gradient() -> None:
    table, optimizer = make("adamw", lr=0.1, weight_decay=0.5)
    before = table.weight.detach().float().clone()
    take_steps(table, optimizer, 0, 10)
    untouched = table.state_dict()["weight"][ROWS // 2 :].float()
    torch.testing.assert_close(untouched, before[ROWS // 2 :] * 0.95**10, rtol=2**-7, atol=0)
    assert not torch.equal(untouched, (before[ROWS // 2 :] * 0.95**10).bfloat16().float())


def test_only_row_sparse_optimizers_train_them() -> None:
    layers = nn.Sequential(RowSparseEmbedding(10, 4, dtype=torch.bfloat16), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="updates must be 'auto' or 'row_sparse' for tables in bfloat16, got 'dense'"):
        adopt_tables(RAdamScheduleFree(layers.parameters()), layers, "dense")
    with pytest.raises(ValueError, match="optimizer must be row-sparse, got one that is not"):
        adopt_tables(torch.optim.SGD(layers.parameters()), layers, "auto")
    assert isinstance(adopt_tables(torch.optim.AdamW(layers.parameters()), layers, "auto"), RowSparseAdamW)
