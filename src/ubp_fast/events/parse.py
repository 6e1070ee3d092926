"""Foreign columns -> canonical ones: ids, code vectors, text. Every value is checked, in linear time."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np
import polars as pl

from ubp_fast.compiled import njit
from ubp_fast.events.checks import CODES, bad_rows, require_amounts
from ubp_fast.events.schema import NUM_CODES, DataError

TEXTS_AT_A_TIME = 1 << 15
_WORD = re.compile(r"\w+")
CODE_PROBLEMS = (
    "",
    "it is not one vector in brackets",
    "it holds something that is not an integer",
    f"it does not hold {NUM_CODES} codes",
    "a code is outside 0..255",
)


def parse_ids(file: str, column: pl.Series) -> pl.Series:
    """Integer ids as i64, same name.

    Raises:
        DataError: floats, text or another dtype, nulls, or values that do not fit into 64 signed bits.
    """
    if not column.dtype.is_integer():
        raise DataError(
            f"{file}: column '{column.name}' must hold integers, got {column.dtype};"
            " cast it to int64 (a float column usually comes from missing values: remove those rows first)"
        )
    if column.null_count():
        raise bad_rows(file, column.name, "hold an id in every row", column.is_null(), column, "remove those rows")
    ids = column.cast(pl.Int64, strict=False)
    if ids.null_count():
        raise bad_rows(file, column.name, "fit into int64", ids.is_null(), column, "map the ids to smaller numbers")
    return ids


def parse_amounts(file: str, column: pl.Series) -> pl.Series:
    """Pieces or money as f32 >= 0, same name.

    Raises:
        DataError: no numbers, or one that is missing, below 0 or too large.
    """
    if not column.dtype.is_numeric():
        raise DataError(f"{file}: column '{column.name}' must hold numbers, got {column.dtype}; cast the column")
    amounts = column.cast(pl.Float64).cast(pl.Float32)
    require_amounts(file, pl.DataFrame([amounts]), [column.name])
    return amounts


def number_ids(file: str, column: str, values: pl.Series, order: pl.Series) -> tuple[pl.Series, pl.DataFrame | None]:
    """Ids as i64; integers stay as they are, text is numbered in order of first appearance.

    Args:
        file: for messages.
        column: its name in that file.
        values: ids of any integer dtype, or text; nulls stay null.
        order: row numbers in the order in which to go through the rows. By time, so that later rows cannot change
            the numbers of earlier ones.

    Returns:
        i64 series of the same name, and for text the table value -> id.

    Raises:
        DataError: neither integers nor text.
    """
    if values.dtype not in (pl.String, pl.Categorical) and not isinstance(values.dtype, pl.Enum):
        parse_ids(file, values.drop_nulls().alias(column))
        return values.cast(pl.Int64), None
    text = values.cast(pl.String).alias("value")
    seen = text.gather(order).drop_nulls().unique(maintain_order=True)
    table = pl.DataFrame([seen]).with_row_index("id").select("value", pl.col("id").cast(pl.Int64))
    ids = pl.DataFrame([text]).join(table, on="value", how="left", maintain_order="left")["id"]
    return ids.alias(values.name), table


def parse_codes(file: str, column: pl.Series) -> pl.Series:
    """Vectors of 16 codes 0..255 from text '[1 2 ... 16]' or from lists of integers.

    Returns:
        u8[16] series, same name.

    Raises:
        DataError: wrong dtype, null, or a vector that is not 16 integers in 0..255.
    """
    if column.dtype == CODES and not column.null_count():
        return column
    if column.null_count():
        raise bad_rows(file, column.name, "hold a vector in every row", column.is_null(), column, "remove those rows")
    if column.dtype == pl.String:
        values, problem = _codes_of_text(column)
    elif isinstance(column.dtype, pl.List | pl.Array) and column.dtype.inner.is_integer():
        values, problem = _codes_of_lists(column.cast(pl.List(pl.Int64), strict=False))
    else:
        raise DataError(
            f"{file}: column '{column.name}' must hold text like '[1 2 ... 16]' or lists of integers,"
            f" got {column.dtype}; write the 16 codes of each vector separated by spaces, in brackets"
        )
    if problem.any():
        bad = pl.Series(problem != 0)
        detail = CODE_PROBLEMS[int(problem[int(bad.arg_true()[0])])]
        rule = f"hold vectors of {NUM_CODES} codes 0..255 like '[1 2 ... 16]'"
        raise bad_rows(file, column.name, rule, bad, column, "correct or remove those rows", detail)
    return pl.Series(column.name, values, dtype=CODES)


def _codes_of_text(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Some texts at a time joined into one buffer that stays in the cache, then one pass over its bytes."""
    codes = np.empty((len(column), NUM_CODES), np.uint8)
    problem = np.empty(len(column), np.uint8)
    for start in range(0, len(column), TEXTS_AT_A_TIME):
        part = column.slice(start, TEXTS_AT_A_TIME)
        rows = slice(start, start + len(part))
        offsets = np.zeros(len(part) + 1, np.int64)
        np.cumsum(part.str.len_bytes().to_numpy(), out=offsets[1:])
        joined = part.str.join("").cast(pl.Binary).item()
        codes[rows], problem[rows] = _parse_code_bytes(np.frombuffer(joined, np.uint8), offsets)
    return codes, problem


def _codes_of_lists(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    lengths = column.list.len().to_numpy()
    low, high = column.list.min().fill_null(0), column.list.max().fill_null(0)
    problem = np.where(((low < 0) | (high > 255)).to_numpy(), 4, 0).astype(np.uint8)
    problem[lengths != NUM_CODES] = 3
    # A null inside a list is no integer.
    problem[column.list.eval(pl.element().is_null()).list.any().fill_null(False).to_numpy()] = 2
    if problem.any() or not len(column):
        return np.zeros((len(column), NUM_CODES), np.uint8), problem
    flat = column.explode().cast(pl.UInt8).to_numpy()
    return flat.reshape(-1, NUM_CODES), problem


def hash_texts(texts: pl.Series) -> pl.Series:
    """Codes u8[16] per text: code j belongs to word j modulo the number of words.

    Texts that share their words share codes; case and punctuation do not count. A null is an empty text.

    Args:
        texts: text series.

    Returns:
        series of the same name and length.
    """
    filled = texts.fill_null("")
    unique = filled.unique(maintain_order=True)
    codes = np.frombuffer(b"".join(map(_codes_of_words, unique)), np.uint8).reshape(-1, NUM_CODES)
    table = pl.DataFrame([unique.alias("text"), pl.Series("codes", codes, dtype=CODES)])
    joined = pl.DataFrame([filled.alias("text")]).join(table, on="text", how="left", maintain_order="left")
    return joined["codes"].alias(texts.name)


def _codes_of_words(text: str) -> bytes:
    words = _WORD.findall(text.lower())[:NUM_CODES] or [""]
    return bytes(_digest(words[j % len(words)])[j // len(words)] for j in range(NUM_CODES))


@lru_cache(maxsize=100_000)
def _digest(word: str) -> bytes:
    return hashlib.blake2b(word.encode(), digest_size=NUM_CODES).digest()


@njit
def _parse_code_bytes(text, offsets):  # pragma: no cover - compiled
    """Codes u8 [N, 16] and the index of the problem in CODE_PROBLEMS u8 [N] of each vector in a byte buffer."""
    rows = offsets.size - 1
    codes = np.zeros((rows, 16), np.uint8)
    problem = np.zeros(rows, np.uint8)
    for row in range(rows):
        state, count, value, digits = 0, 0, 0, 0  # state 0: before '[', 1: inside, 2: after ']'
        bad = 0
        for position in range(offsets[row], offsets[row + 1]):
            character = text[position]
            digit = np.int64(character) - 48
            if 0 <= digit <= 9 and state == 1:
                value = min(value * 10 + digit, 1000)
                digits += 1
                continue
            space = character == 32 or 9 <= character <= 13
            if not space and not (character == 91 and state == 0) and not (character == 93 and state == 1):
                bad = 2 if state == 1 else 1
                break
            if digits:
                if value > 255:
                    bad = 4
                    break
                if count < 16:
                    codes[row, count] = value
                count, value, digits = count + 1, 0, 0
            if not space:
                state += 1
        if bad == 0 and state != 2:
            bad = 1
        if bad == 0 and count != 16:
            bad = 3
        problem[row] = bad
    return codes, problem
