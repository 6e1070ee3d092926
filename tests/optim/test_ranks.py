"""Tables divided among processes equal whole ones in one process: rows, states, padding, clipping, where they begin."""

from __future__ import annotations

import resource
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from schedulefree import RAdamScheduleFree
from support.ranks import run_ranks
from support.two_tables import FLOAT_BETAS, Batch, TwoTables, batches, distance
from torch import Tensor, nn
from torch.optim import AdamW

from ubp_fast.files import load_tensors
from ubp_fast.optim import RowSparseEmbedding, adopt_tables, clip_gradient_norm
from ubp_fast.optim.ranks import divided, divided_tables, regrouped, return_gradients, sum_gradients, write_whole

# Every batch of 40 ids: none for the first process.
PARTS = (0, 0, 3, 40)
WORLD, STEPS, MAX_NORM = len(PARTS) - 1, 60, 2.0
OPTIMIZERS = {"schedule_free": RAdamScheduleFree, "adamw": AdamW}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
LARGE_ROWS, LARGE_WIDTH = 10_000_000, 128
SIZES = (1, 2, 65_536 + 5)  # of tables whose first rows are looked at
CASES = [(kind, name) for kind in OPTIMIZERS for name in DTYPES]


def optimizer_of(kind: str, model: nn.Module) -> Any:
    return OPTIMIZERS[kind](model.parameters(), lr=1e-2, betas=FLOAT_BETAS)


def trained(model: TwoTables, optimizer: Any, parts: list[Batch]) -> None:
    """With a look at the weights for use in the middle, and steps that leave one table out."""
    switch = lambda mode: getattr(optimizer, mode, lambda: None)()  # noqa: E731
    for step, batch in enumerate(parts):
        switch("train")
        optimizer.zero_grad()
        model.loss(batch, uses_second=step % 3 > 0).backward()
        of_rows = divided(model)
        if of_rows:
            return_gradients(of_rows.values())
            sum_gradients((part for part in model.parameters() if part not in of_rows), dist.group.WORLD)
        clip_gradient_norm(model.parameters(), MAX_NORM, of_rows)
        optimizer.step()
        if step == STEPS // 2:
            switch("eval")
    switch("eval")


def on_a_rank(rank: int, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, name in CASES:
        with divided_tables(dist.group.WORLD):
            model = TwoTables(RowSparseEmbedding, DTYPES[name])
        optimizer = adopt_tables(optimizer_of(kind, model), model, "auto")
        part = slice(PARTS[rank], PARTS[rank + 1])
        trained(model, optimizer, [(ids[part], noise[part]) for ids, noise in batches(STEPS, DTYPES[name])])
        write_whole(directory / f"{kind}-{name}.safetensors", model, rank == 0)
        found[f"{kind}-{name}"] = optimizer.state_dict()["state"]
    found |= {f"{rows} rows": first_rows(rank, rows) for rows in SIZES}
    return {**found, "refused": wrong_ids()}


def first_rows(rank: int, rows: int) -> dict[str, Any]:
    with divided_tables(dist.group.WORLD):
        torch.manual_seed(3)
        table = RowSparseEmbedding(rows, 7, padding_idx=-1)
    return {"asked": table(torch.arange(rows * rank) % rows).detach(), "held": len(table.weight)}


def wrong_ids() -> str:
    with divided_tables(dist.group.WORLD):
        table = RowSparseEmbedding(5, 2)
    said = []
    for ids in ([0, 5], [-1, 4]):
        with pytest.raises(IndexError) as error:  # before anything is asked of others
            table(torch.tensor(ids))
        said.append(str(error.value))
    return "; ".join(said)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("ranks")
    return directory, run_ranks(on_a_rank, WORLD, directory, directory)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_equal_whole_tables_of_one_process(kind: str, name: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Against the dense optimizer and `nn.Embedding`."""
    model = TwoTables(nn.Embedding, DTYPES[name])
    optimizer = optimizer_of(kind, model)
    trained(model, optimizer, batches(STEPS, DTYPES[name]))
    directory, of_ranks = ranks
    written, most = load_tensors(directory / f"{kind}-{name}.safetensors"), 1e-12 if name == "float64" else 1e-5
    assert not list(directory.glob("*.tables"))
    for part, wanted in model.state_dict().items():
        assert written[part].dtype == wanted.dtype and distance(written[part], wanted) <= most, part
    for place, state in optimizer.state_dict()["state"].items():
        for part, wanted in state.items():
            for rank, found in enumerate(of_ranks):
                theirs = wanted[rank::WORLD] if wanted.ndim == 2 and place < 2 else wanted
                assert distance(found[f"{kind}-{name}"][place][part], theirs) <= most, (place, part, rank)


@pytest.mark.parametrize("rows", SIZES)
def test_initial_rows_are_those_of_a_whole_table(rows: int, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    torch.manual_seed(3)
    wanted = nn.Embedding(rows, 7, padding_idx=-1).weight.detach()
    for rank, of_rank in enumerate(ranks[1]):
        found = of_rank[f"{rows} rows"]
        assert torch.equal(found["asked"], wanted[torch.arange(rows * rank) % rows])
        assert found["held"] == len(wanted[rank::WORLD])


def test_ids_outside_are_errors(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for of_rank in ranks[1]:
        assert "must be in 0..4, got 5" in of_rank["refused"] and "must be in 0..4, got -1" in of_rank["refused"]


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def large_table(rank: int) -> dict[str, int]:
    before = peak_bytes()
    with divided_tables(dist.group.WORLD):
        model = nn.Sequential(RowSparseEmbedding(LARGE_ROWS, LARGE_WIDTH))
    optimizer = adopt_tables(RAdamScheduleFree(model.parameters()), model, "auto")
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        optimizer.train()  # type: ignore[attr-defined]
        model(torch.randint(LARGE_ROWS, (20_000,), generator=generator)).square().sum().backward()
        return_gradients(divided(model).values())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()  # type: ignore[attr-defined]
    return {"bytes": peak_bytes() - before, "touched": int(model[0].touched.used)}  # type: ignore[union-attr, operator]


@pytest.mark.slow
def test_each_of_four_processes_holds_a_quarter_of_ten_million_rows(tmp_path: Path) -> None:
    whole = LARGE_ROWS * LARGE_WIDTH * 4
    for found in run_ranks(large_table, 4, tmp_path):
        state = found["touched"] * LARGE_WIDTH * 4 * 2
        print(f"{found['bytes'] / 1e9:.2f} GB of {whole / 1e9:.2f} GB, {state / 1e9:.2f} GB of it moments")
        assert found["touched"] > 50_000
        assert found["bytes"] < whole / 4 + state + 0.4e9  # slots and steps of rows, a part while it is drawn, batches


@pytest.mark.parametrize(("former", "world"), [*pairwise((1, 3, 2, 4, 1))])
def test_rows_change_hands(former: int, world: int) -> None:
    """Each row keeps its weight, its last step and, if it was touched, its state, whoever holds it."""
    generator = torch.Generator().manual_seed(0)
    total = 11
    weight = torch.randn(total, 2, generator=generator)
    last_step = torch.randint(-1, 3, (total,), generator=generator, dtype=torch.int32)
    state = torch.randn(total, 2, 2, generator=generator)

    def part(rank: int, world: int) -> dict[str, Any]:
        ids = torch.arange(total)[rank::world]
        touched = (last_step[ids] >= 0).nonzero()[:, 0].flip(0)
        slot = torch.full((len(ids),), -7, dtype=torch.int32)
        slot[touched] = torch.arange(len(touched), dtype=torch.int32)
        rows = {"weight": weight[ids], "last_step": last_step[ids], "slot": slot, "state": state[ids[touched]]}
        return {**rows, "used": torch.tensor([len(touched)]), "steps": 2}

    def seen(part: dict[str, Any]) -> list[Tensor]:
        touched = part["last_step"] >= 0
        assert int(part["used"]) == len(part["state"]) == int(touched.sum())
        return [part["weight"], part["last_step"], part["state"][part["slot"][touched].long()]]

    for rank in range(world):
        found = regrouped([part(one, former) for one in range(former)], rank, world)
        assert found["steps"] == 2
        for mine, wanted in zip(seen(found), seen(part(rank, world)), strict=True):
            assert torch.equal(mine, wanted)
