"""Vectors of a new model in the space of an earlier one, so that what was trained on those keeps working.

    directions, factors, networks   turned: V Q, Q = argmin |V_new Q - V_old|, Q orthogonal
    scores, features, habits        by the names of their columns; what the new model does not count becomes 0

The same clients at the same moment by both models fit Q, so no change of the clients is in it.
Source: Schoenemann, A generalized solution of the orthogonal Procrustes problem, 1966.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ubp_fast.events.schema import UserError
from ubp_fast.features.scaling import one_blas_thread
from ubp_fast.kernels.row_product import row_product
from ubp_fast.profiles.blocks import Layout

NAMED_BLOCKS = ("scores", "own", "rhythm")
CONSTANT = "constant"


@dataclass(frozen=True)
class Alignment:
    """How vectors become like those of an earlier model; `fit_alignment` makes it.

    Attributes:
        own: layout of the vectors as they are.
        layout: of the earlier model, and of the result.
        turns: block -> float64 [columns here, columns there].
    """

    own: Layout
    layout: Layout
    turns: Mapping[str, np.ndarray]

    def apply(self, vectors: np.ndarray, blocks: Layout | None = None) -> np.ndarray:
        """Vectors float16 [N, D there] of vectors float16 [N, D here]; a row depends on itself alone.

        Args:
            vectors: of all blocks, or of those that are asked for.
            blocks: the wanted part of `layout`, all of it when None.
        """
        wanted = blocks or self.layout
        here = self.own if blocks is None else self.own.select(*(block.name for block in wanted.blocks))
        turned = np.zeros((len(vectors), wanted.width), np.float16)
        for block in wanted.blocks:
            values, target = vectors[:, here.columns_of(block.name)], wanted.columns_of(block.name)
            if block.name in self.turns:
                turned[:, target] = row_product(values.astype(np.float64), self.turns[block.name]).astype(np.float32)
                continue
            names = next(one.columns for one in here.blocks if one.name == block.name)
            place = {name: column for column, name in enumerate(names)}
            known = [column for column, name in enumerate(block.columns) if name in place]
            turned[:, target[known]] = values[:, [place[block.columns[column]] for column in known]]
        return turned


def without_turning(alignment: Alignment) -> Alignment:
    """The same columns of the same blocks as they are, for comparison."""
    return replace(alignment, turns={name: np.eye(*turn.shape) for name, turn in alignment.turns.items()})


@one_blas_thread()
def fit_alignment(new: np.ndarray, own: Layout, old: np.ndarray, layout: Layout) -> tuple[Alignment, dict[str, float]]:
    """The alignment of two models by what they make of the same clients at the same moment.

    Args:
        new: vectors float16 [N, D here], layout `own`.
        old: vectors float16 [N, D there] of the earlier model, layout `layout`.

    Returns:
        The alignment, and by block the share of the old vectors' variance that the aligned ones explain.

    Raises:
        UserError: a block of the earlier model that the new one lacks.
    """
    names = [block.name for block in own.blocks]
    turns = {}
    for block in layout.blocks:
        if block.name not in names:
            raise UserError(
                f"profiles.align_to: the new profile must have the block '{block.name}' of the old one, got {names};"
                " choose the same profile="
            )
        if block.name in NAMED_BLOCKS:
            continue
        here, there = own.columns_of(block.name), layout.columns_of(block.name)
        left, right = new[:, here].astype(np.float64), old[:, there].astype(np.float64)
        columns = next(one.columns for one in own.blocks if one.name == block.name)
        free_here = np.array([name != CONSTANT for name in columns])
        free_there = np.array([name != CONSTANT for name in block.columns])
        turn = np.zeros((len(here), len(there)))
        turn[np.ix_(~free_here, ~free_there)] = 1.0
        u, _, vt = np.linalg.svd(left[:, free_here].T @ right[:, free_there], full_matrices=False)
        turn[np.ix_(free_here, free_there)] = u @ vt
        turns[block.name] = turn
    alignment = Alignment(own, layout, turns)
    aligned = alignment.apply(new)
    explained = {}
    for block in layout.blocks:
        place = layout.columns_of(block.name)
        target = old[:, place].astype(np.float64)
        error = ((aligned[:, place].astype(np.float64) - target) ** 2).sum()
        explained[block.name] = float(1 - error / max(((target - target.mean(axis=0)) ** 2).sum(), 1e-300))
    return alignment, explained
