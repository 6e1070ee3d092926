from __future__ import annotations

from datetime import datetime, timezone

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ubp_fast.events.checks import CODES
from ubp_fast.events.parse import parse_codes, parse_ids
from ubp_fast.events.schema import DataError

GOOD = "[" + " ".join(str(code) for code in range(16)) + "]"
DAY = datetime(2022, 11, 9, 23, 59, 58)
DAY_S = int(DAY.replace(tzinfo=timezone.utc).timestamp())


def test_ids_of_any_integer_dtype() -> None:
    assert parse_ids("f", pl.Series([1, 255], dtype=pl.UInt8)).dtype == pl.Int64
    assert parse_ids("f", pl.Series([-(2**63), 2**63 - 1])).to_list() == [-(2**63), 2**63 - 1]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pl.Series("sku", [1.0, 2.0]), "hold integers, got Float64; cast it to int64"),
        (pl.Series("sku", [1.0, float("nan")]), "hold integers, got Float64"),
        (pl.Series("sku", ["1"]), "hold integers, got String"),
        (pl.Series("sku", [4, None, None]), "hold an id in every row, got None in row 1 \\(2 bad rows of 3\\)"),
        (pl.Series("sku", [1, 2**63], dtype=pl.UInt64), "fit into int64, got 9223372036854775808 in row 1"),
    ],
)
def test_bad_ids(column: pl.Series, message: str) -> None:
    with pytest.raises(DataError, match=f"f: column 'sku' must {message}"):
        parse_ids("f", column)


def test_code_vectors() -> None:
    column = pl.Series("query", [GOOD, " [255  0 1 2 3 4 5 6\n 7 8 9 10 11 12 13 007 ] "])
    parsed = parse_codes("f", column)
    assert parsed.dtype == CODES
    assert parsed.to_list() == [list(range(16)), [255, *range(14), 7]]


def test_code_vectors_as_lists() -> None:
    assert parse_codes("f", pl.Series([list(range(16))])).to_list() == [list(range(16))]
    assert parse_codes("f", pl.Series([], dtype=pl.List(pl.UInt8))).dtype == CODES


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1 2 x]", "not an integer"),
        (GOOD[:-4] + "]", "does not hold 16 codes"),
        (GOOD[:-1] + " 16]", "does not hold 16 codes"),
        ("[]", "does not hold 16 codes"),
        ("[256" + GOOD[2:], "outside 0..255"),
        ("[99999999999999999999999" + GOOD[2:], "outside 0..255"),
        ("[-1" + GOOD[2:], "not an integer"),
        (GOOD.replace(" ", ", "), "not an integer"),
        (GOOD.replace("[0 ", "[0.5 "), "not an integer"),
        (GOOD[:-1], "not one vector in brackets"),
        (GOOD[1:], "not one vector in brackets"),
        (GOOD + GOOD, "not one vector in brackets"),
        ("", "not one vector in brackets"),
        ("ą" + GOOD, "not one vector in brackets"),
    ],
)
def test_malformed_code_vectors(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"f: column 'query' must .*{reason}\\) in row 1 \\(2 bad rows of 4\\)"):
        parse_codes("f", pl.Series("query", [GOOD, text, GOOD, text]))


@pytest.mark.parametrize("values", [[[1] * 15], [[1] * 15 + [256]], [[-1] + [1] * 15], [[None] + [1] * 15], [None]])
def test_malformed_lists(values: list) -> None:
    with pytest.raises(DataError, match="in row 0"):
        parse_codes("f", pl.Series(values, dtype=pl.List(pl.Int64)))


def test_a_long_malformed_vector_costs_linear_time() -> None:
    """The organisers' pattern needs more than 15 s for seven numbers and a stray letter; here are a million."""
    with pytest.raises(DataError, match="not an integer"):
        parse_codes("f", pl.Series("query", ["[" + "1 " * 1_000_000 + "x]"]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), min_size=16, max_size=16), max_size=20), st.integers(0, 2**32))
def test_numpy_prints_what_we_read(vectors: list[list[int]], seed: int) -> None:
    texts = [str(np.array(vector)) if seed % 2 else "[" + " ".join(map(str, vector)) + "]" for vector in vectors]
    assert parse_codes("f", pl.Series("q", texts, dtype=pl.String)).to_list() == vectors


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="[] 0129x,\n", max_size=60))
def test_any_text_is_read_as_python_would_or_refused(text: str) -> None:
    body = text.strip()
    fields = body[1:-1].split() if len(body) >= 2 and body[0] == "[" and body[-1] == "]" else None
    good = fields is not None and len(fields) == 16 and all(f.isdigit() and int(f) < 256 for f in fields)
    if good:
        assert fields is not None
        assert parse_codes("f", pl.Series([text])).to_list() == [[int(f) for f in fields]]
    else:
        with pytest.raises(DataError):
            parse_codes("f", pl.Series([text]))
