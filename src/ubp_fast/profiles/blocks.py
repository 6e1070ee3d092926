"""What a profile is made of: named blocks of columns side by side, each with a scale of its own.

    strong    few columns of deviation 1 that say most about what comes next: for a reader that takes few steps
    graded    more such directions, each as large as what it says: for regressions
    near      unit vectors whose angle says who is alike: for vector indexes, which take this block alone
    scores    how likely the client buys each listed category, sku and price, as log odds
    own       the features themselves, standardised: nothing is lost to a reader that chooses scales, or needs none
    tastes    factors of all items, pages and searches, also of what is on no list of labels
    rhythm    when, how often, how much at once, at what price, how much of it new; pieces and money where known
    learned   vectors of the trained models, where the experiment trains any

A network that takes few steps moves every weight by about its learning rate, whatever the size of the column, so only
the strong block may be large. Readers that bring columns to one scale (regressions) or need none (trees) lose nothing
by it: at a deviation of .0001 float16 still tells apart what differs by .0006 deviations. Distances are ruled by the
strong block: a search for neighbours takes `Profiles.select("near")` and the cosine.

A model of a label that few clients have does best where it believes the label's own forecast, of scores, first.

`profile.json` beside the vectors describes the blocks; `Profiles.select` gives some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.features.scaling import ROWS_AT_ONCE, DayStatistics, Rows, standardised

MAX_DIM = 2048
# The block that a search for neighbours takes.
NEAR = "near"
# Those whose columns forecast labels: what models of few buyers believe first.
FORECASTS = ("scores",)
FORMAT = 1
# The bits of a float16 that are all set in what is not finite; NumPy computes with float16 one by one.
HALF_INFINITY = np.uint16(0x7C00)


@dataclass(frozen=True)
class LayoutConfig:
    """Scales of the blocks behind the strong one: the deviation of their columns; 0 leaves a block out.

    Attributes:
        constant: value of the strong block's constant column; a larger one slows a network's first layer.
        directions: columns of the graded block.
        graded: of the first graded direction; the others fall with the power .75 of their singular values.
        near: length of the near block's vectors.
        near_width: columns of the near block.
        scores: of the scores of pairs; those of a client alone are 50 times as large.
        own: of the features.
        tastes: of the factors.
        rhythm: of the columns about time and habits.
        learned: of the models' vectors.
        max_width: columns at most; the features with the smallest part in the predictions are left out.
            Source: the organisers' limit.
    """

    constant: float = 1.0
    directions: int = 40
    graded: float = 0.002
    near: float = 0.0025
    near_width: int = 128
    scores: float = 0.0001
    own: float = 0.0001
    tastes: float = 0.0001
    rhythm: float = 0.0001
    learned: float = 0.0001
    max_width: int = MAX_DIM

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0:
                raise UserError(f"LayoutConfig: {name} must be >= 0, got {value}")
        for name, scale in (("directions", "graded"), ("near_width", "near")):
            if getattr(self, name) < 1:
                raise UserError(
                    f"LayoutConfig: {name} must be >= 1, got {getattr(self, name)}; {scale}=0 leaves it out"
                )
        if self.max_width > MAX_DIM:
            raise UserError(f"LayoutConfig: max_width must be <= {MAX_DIM}, got {self.max_width}")


@dataclass(frozen=True)
class Block:
    """One block of columns.

    Attributes:
        name: unique in a profile.
        scale: deviation of its columns among the clients of the profile's day, one for all or one each; None: as
            the model gives them.
        what: what the columns say, one sentence.
        source: what they were made from.
        columns: a name per column.
        left_out: names of columns for which there was no room.
    """

    name: str
    scale: float | tuple[float, ...] | None
    what: str
    source: str
    columns: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The blocks of a profile from left to right."""

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        names = [block.name for block in self.blocks]
        if len(set(names)) < len(names):
            raise ValueError(f"Layout: blocks must have different names, got {names}")

    @property
    def width(self) -> int:
        """Columns of all blocks."""
        return sum(len(block.columns) for block in self.blocks)

    def columns_of(self, *names: str) -> np.ndarray:
        """Positions i64 of the columns of some blocks, in the profile's order.

        Raises:
            UserError: a name that no block has, or none at all.
        """
        known = [block.name for block in self.blocks]
        if not names or not set(names) <= set(known):
            raise UserError(f"profiles: blocks must be among {known}, got {list(names)}")
        chosen = np.concatenate([np.full(len(block.columns), block.name in names) for block in self.blocks])
        return np.flatnonzero(chosen)

    @property
    def forecasts(self) -> np.ndarray | None:
        """Positions i64 of the columns of `FORECASTS`; None where a block of them is missing or has no columns."""
        filled = {block.name for block in self.blocks if block.columns}
        return self.columns_of(*FORECASTS) if {*FORECASTS} <= filled else None

    def select(self, *names: str) -> Layout:
        """The layout of these blocks alone, in the profile's order."""
        self.columns_of(*names)
        return Layout(tuple(block for block in self.blocks if block.name in names))

    def to_json(self) -> dict[str, Any]:
        """Plain data for profile.json."""
        blocks, first = [], 0
        for block in self.blocks:
            blocks.append(asdict(block) | {"first_column": first, "num_columns": len(block.columns)})
            first += len(block.columns)
        return {"format": FORMAT, "width": first, "blocks": blocks}

    @classmethod
    def from_json(cls, value: Any, file: str = "profile.json") -> Layout:
        """Reads what `to_json` gave.

        Raises:
            DataError: another format, or something else.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            found = value.get("format") if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{file}: format must be {FORMAT}, got {found}; make the profiles again or remove the file")
        try:
            fields = ("name", "scale", "what", "source", "columns", "left_out")
            return cls(tuple(Block(*(_as_tuple(block[name]) for name in fields)) for block in value["blocks"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: blocks must be those of a profile, got {error!r}; remove the file") from error


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Part(NamedTuple):
    """What becomes a block.

    Attributes:
        name: of the block.
        values: float [N, F], clients in the order of the profile; read block of rows by block of rows.
        columns: F names.
        scale: deviation of the columns, one for all or one each; None to take them as they are.
        what: see `Block`.
        source: see `Block`.
        importance: float64 [F]; where there is no room, columns of the least importance are left out. None: none are.
    """

    name: str
    values: Rows
    columns: Sequence[str]
    scale: float | tuple[float, ...] | None
    what: str
    source: str
    importance: np.ndarray | None = None


def compose(
    parts: Sequence[Part],
    max_width: int = MAX_DIM,
    day: DayStatistics | None = None,
    layout: Layout | None = None,
) -> tuple[np.ndarray, Layout]:
    """Lays parts side by side: vectors float16 [N, D], D <= max_width, and what they are made of.

    Columns that do not vary among the clients become 0. Parts with `importance` share the room that the others leave
    from left to right. Memory beyond the result: 4,096 rows of one part.

    Args:
        parts: what becomes a block each.
        max_width: columns at most.
        day: means and deviations by the name of the part; None: those of the parts' own rows.
        layout: that of vectors which these shall be like; None: it is made from the parts.

    Raises:
        ValueError: other numbers of rows, or of names than columns; a layout of other parts.
        UserError: the parts that must be there whole do not fit.
        DataError: a value that does not fit float16.
    """
    rows = {len(part.values) for part in parts}
    if len(rows) != 1 or any(len(part.columns) != part.values.shape[1] for part in parts):
        shapes = {part.name: [len(part.columns), *part.values.shape] for part in parts}
        raise ValueError(f"compose: parts must have equal rows and a name per column, got {shapes}")
    layout, day = layout or _arranged(parts, max_width), day or DayStatistics()
    vectors = np.empty((rows.pop(), layout.width), np.float16)
    first = 0
    for part, block in zip(parts, layout.blocks, strict=True):
        kept = _kept(part, block)
        _fill(vectors[:, first : first + len(kept)], part, block.scale, kept, day)
        first += len(kept)
    return vectors, layout


def _arranged(parts: Sequence[Part], max_width: int) -> Layout:
    """Which columns have room, and the scales."""
    room = max_width - sum(len(part.columns) for part in parts if part.importance is None)
    if room < 0:
        raise UserError(
            f"profile: max_width must be >= {max_width - room}, the columns that cannot be left out, got {max_width}"
        )
    blocks = []
    for part in parts:
        of_profile = set(range(len(part.columns)))
        if part.importance is not None:
            of_profile = set(np.argsort(-part.importance, kind="stable")[:room].tolist())
            room -= len(of_profile)
        names = tuple(name for column, name in enumerate(part.columns) if column in of_profile)
        left_out = tuple(name for column, name in enumerate(part.columns) if column not in of_profile)
        blocks.append(Block(part.name, _rounded(part.scale), part.what, part.source, names, left_out))
    return Layout(tuple(blocks))


def _kept(part: Part, block: Block) -> np.ndarray:
    """Positions i64 of the block's columns among those of the part."""
    place = {name: column for column, name in enumerate(part.columns)}
    if part.name != block.name or place.keys() != {*block.columns, *block.left_out}:
        raise ValueError(f"compose: layout must be of part '{part.name}' with its columns, got block '{block.name}'")
    return np.array([place[name] for name in block.columns], np.int64)


def _rounded(scale: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
    """Six digits: what the number of threads changes in a sum must not change the description of a profile."""
    if isinstance(scale, tuple):
        return tuple(float(f"{value:.6g}") for value in scale)
    return None if scale is None else float(f"{scale:.6g}")


def _fill(
    target: np.ndarray,
    part: Part,
    scale: float | tuple[float, ...] | None,
    kept: np.ndarray,
    day: DayStatistics,
) -> None:
    # torch rounds to float16 by vector instructions; NumPy takes a hundred times as long for the smallest numbers.
    halves = torch.from_numpy(target)
    if scale is None:
        for start in range(0, len(target), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            halves[rows] = torch.from_numpy(part.values[rows][:, kept])
    else:
        statistics = day.moments(part.name, part.values)
        every = np.array_equal(kept, np.arange(part.values.shape[1]))
        for rows, inputs in standardised(part.values, *statistics, factor=np.asarray(scale), dtype=np.float32):
            halves[rows] = torch.from_numpy(inputs if every else inputs[:, kept])
    for start in range(0, len(target), ROWS_AT_ONCE):
        bits = target[start : start + ROWS_AT_ONCE].view(np.uint16) & HALF_INFINITY
        if (bits == HALF_INFINITY).any():
            row, column = (int(index) for index in np.argwhere(bits == HALF_INFINITY)[0])
            raise DataError(
                f"profile: '{part.columns[int(kept[column])]}' of block '{part.name}' must be finite and fit float16,"
                f" got {target[start + row, column]} in row {start + row}; look for a diverged training"
            )
