"""RowSparseEmbedding: nn.Embedding until it is adopted, and up to date wherever it is read."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ubp_fast.optim import RowSparseEmbedding, RowSparseRAdamScheduleFree
from ubp_fast.optim.touched_rows import reserve


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_alone_it_is_nn_embedding(padding_idx: int | None) -> None:
    torch.manual_seed(1)
    found = RowSparseEmbedding(20, 3, padding_idx)
    torch.manual_seed(1)
    wanted = nn.Embedding(20, 3, padding_idx)
    ids = torch.randint(0, 20, (4, 5))
    for module in (found, wanted):
        (module(ids) ** 2).sum().backward()
    assert torch.equal(found.weight, wanted.weight)
    assert torch.equal(found.weight.grad, wanted.weight.grad)
    assert found.state_dict().keys() == wanted.state_dict().keys()


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_gradient_of_an_adopted_table(padding_idx: int | None) -> None:
    table = RowSparseEmbedding(20, 3, padding_idx)
    plain = copy.deepcopy(table)
    RowSparseRAdamScheduleFree(table.parameters(), [table])
    ids = torch.tensor([[1, 0, 7], [7, 1, 1]])
    noise = torch.randn(2, 6, 3)[:, ::2]
    for module in (table, plain):
        (module(ids) * noise).sum().backward()
    assert table.weight.grad.is_sparse
    assert table.weight.grad._nnz() == len(ids[ids != padding_idx].unique())
    torch.testing.assert_close(table.weight.grad.to_dense(), plain.weight.grad)
    first = table.weight.grad.clone()
    (table(ids) * noise).sum().backward()  # a second lookup adds to it
    torch.testing.assert_close(table.weight.grad.to_dense(), 2 * first.to_dense())
    assert table(torch.empty((0,), dtype=torch.int64)).shape == (0, 3)


def test_every_way_to_the_weights_is_up_to_date() -> None:
    table = RowSparseEmbedding(30, 4)
    optimizer = RowSparseRAdamScheduleFree(table.parameters(), [table], lr=0.1)
    optimizer.train()
    for step in range(12):
        optimizer.zero_grad()
        (table(torch.tensor([step % 5, step])) * torch.randn(2, 4)).sum().backward()
        optimizer.step()
    read = table(torch.arange(30)).detach()
    stale = table.touched.weight.clone()
    assert (read - stale).abs().max() > 1e-3
    with torch.inference_mode():
        assert torch.equal(table(torch.arange(30)), read)
    torch.testing.assert_close(table.state_dict()["weight"], read)
    torch.testing.assert_close(table(torch.arange(30)).detach(), read)
    assert torch.equal(copy.deepcopy(table).weight, table.weight)
    (table(torch.tensor([0, 1])) ** 2).sum().backward()
    optimizer.step()
    table.release()
    assert table.touched is None
    table(torch.arange(30)).sum().backward()


def test_loaded_weights_are_of_the_present() -> None:
    table = RowSparseEmbedding(6, 2)
    optimizer = RowSparseRAdamScheduleFree(table.parameters(), [table], lr=0.1)
    optimizer.train()
    for step in range(9):
        optimizer.zero_grad()
        (table(torch.tensor([step % 2])) * torch.randn(1, 2)).sum().backward()
        optimizer.step()
    wanted = torch.randn(6, 2)
    table.load_state_dict({"weight": wanted})
    assert torch.equal(table(torch.arange(6)).detach(), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process that has threads is what is tested
def test_a_forked_process_has_weights_of_its_own() -> None:
    """They lay in shared memory once: a child that trained changed its parent."""
    table = RowSparseEmbedding(300, 8)
    before = table.weight.detach().clone()
    child = os.fork()
    if child == 0:
        table.weight.data.numpy().fill(7.0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(table.weight, before)


def test_reserved_memory_is_zero_and_any_shape() -> None:
    for shape in ((5, 2, 3), (0, 4), (1,)):
        for dtype in (torch.float32, torch.float64):
            memory = reserve(shape, dtype, torch.device("cpu"))
            assert memory.shape == shape and memory.dtype == dtype
            assert not memory.any()


def test_no_word_of_sparse_invariants(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11 warned although they were left out by name."""
    make = torch.sparse_coo_tensor

    def warning(*arguments: Any, **options: Any) -> torch.Tensor:
        assert options["check_invariants"] is False
        warnings.warn("Sparse invariant checks are implicitly disabled. Memory errors will occur", stacklevel=2)
        return make(*arguments, **options)

    monkeypatch.setattr(torch, "sparse_coo_tensor", warning)
    table = RowSparseEmbedding(6, 2)
    RowSparseRAdamScheduleFree(table.parameters(), [table])
    table(torch.tensor([1, 1])).sum().backward()
    assert table.weight.grad.is_coalesced() or table.weight.grad._nnz() == 1
