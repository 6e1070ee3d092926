"""Alignment: a turned space is turned back, named columns go by their names, a row depends on itself alone."""

from __future__ import annotations

import numpy as np
import pytest

from ubp_fast.events.schema import UserError
from ubp_fast.profiles.alignment import fit_alignment
from ubp_fast.profiles.blocks import Block, Layout


def block(name: str, columns: tuple[str, ...]) -> Block:
    return Block(name, 1.0, "", "", columns)


OLD = Layout(
    (block("strong", ("direction_0", "direction_1", "direction_2", "constant")), block("own", ("a", "b", "c")))
)
NEW = Layout(
    (block("strong", ("direction_0", "direction_1", "direction_2", "constant")), block("own", ("c", "x", "a")))
)


def spaces(clients: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """The same clients in a new and in an old space, which is the new one turned."""
    state = np.random.default_rng(0)
    new = state.standard_normal((clients, NEW.width))
    new[:, 3] = 1
    turn, _ = np.linalg.qr(state.standard_normal((3, 3)))
    old = np.concatenate([new[:, :3] @ turn, new[:, 3:4], new[:, [6]], np.ones((clients, 1)), new[:, [4]]], axis=1)
    return new.astype(np.float16), old.astype(np.float16)


def test_a_turned_space_is_turned_back() -> None:
    new, old = spaces()
    alignment, explained = fit_alignment(new, NEW, old, OLD)
    found = alignment.apply(new)
    np.testing.assert_allclose(found[:, :3], old[:, :3], atol=5e-3)
    assert (found[:, 3] == 1).all(), "the constant is none of the directions"
    assert np.array_equal(found[:, [4, 6]], old[:, [4, 6]]), "a and c by their names"
    assert not found[:, 5].any(), "b is not counted any more"
    assert explained["strong"] > 0.999
    np.testing.assert_allclose(alignment.turns["strong"] @ alignment.turns["strong"].T, np.eye(4), atol=1e-9)


def test_rows_and_blocks_stand_alone() -> None:
    new, old = spaces()
    alignment, _ = fit_alignment(new, NEW, old, OLD)
    whole = alignment.apply(new)
    assert alignment.apply(new[7:8]).tobytes() == whole[7].tobytes()
    own = alignment.apply(new[:, 4:], OLD.select("own"))
    assert np.array_equal(own, whole[:, 4:])


def test_a_block_that_is_missing_is_named() -> None:
    new, old = spaces()
    with pytest.raises(UserError, match="must have the block 'own' of the old one"):
        fit_alignment(new[:, :4], NEW.select("strong"), old, OLD)
