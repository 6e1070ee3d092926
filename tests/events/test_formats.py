"""What a file is follows from its content; every form of the same rows gives the same table."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import polars as pl
import pytest

from ubp_fast.events.checks import require_columns
from ubp_fast.events.formats import FileForm, RawTable, natural, read_files
from ubp_fast.events.schema import DataError, UserError

COLUMNS = ["who", "when", "what"]
ROWS = [("007", "2024-01-31 10:30:00", "cup"), ("7", "2024-02-01", 'a "red", pan')]
FRAME = pl.DataFrame(ROWS, schema=COLUMNS, orient="row")
TEXT = FRAME.write_csv()


def wanted(names: list[str]) -> list[str]:
    require_columns("log", names, COLUMNS, "name it")
    return COLUMNS


def read(path: Path | str | list[str], drop: bool = False, **form: object) -> RawTable:
    return read_files(path if isinstance(path, list) else str(path), FileForm(**form), wanted, drop)  # type: ignore[arg-type]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def arrow(stream: bool) -> bytes:
    file = io.BytesIO()
    (FRAME.write_ipc_stream if stream else FRAME.write_ipc)(file)
    return file.getvalue()


def zstd(text: str) -> bytes:
    duckdb = pytest.importorskip("duckdb")
    path = Path("packed.zst")
    frame = pl.DataFrame({"line": text.rstrip("\n").split("\n")})  # noqa: F841 - read by name
    duckdb.sql(
        "copy (select line from frame) to 'packed.zst' (header false, quote '', delimiter '\x1f', compression zstd)"
    )
    return path.read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\r"),
        "\n" + TEXT.replace("\n", "\n\n"),
        FRAME.write_csv(separator="\t"),
        FRAME.write_csv(separator=";"),
        FRAME.write_csv(separator="|"),
        FRAME.write_csv(separator="\x01"),
        FRAME.write_csv(quote_style="always"),
        "who, when ,what\n" + TEXT.split("\n", 1)[1],
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        gzip.compress(TEXT.encode()),
        gzip.compress(TEXT.encode("utf-16")),
        gzip.compress(FRAME.write_ndjson().encode()),
        FRAME.write_ndjson(),
        FRAME.write_json(),
        "[\n" + FRAME.write_ndjson().replace("}\n{", "},\n{") + "]",
        arrow(False),
        arrow(True),
    ],
)
def test_the_name_says_nothing(tmp_path: Path, content: str | bytes) -> None:
    raw = read(written(tmp_path / "log.dat", content))
    assert raw.frame.rows() == ROWS
    assert raw.files == ((str(tmp_path / "log.dat"), 2),)


def test_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "log", zstd(FRAME.write_csv(separator=";")))
    assert read(tmp_path / "log").frame.rows() == ROWS


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (TEXT.split("\n", 1)[1], {"columns": COLUMNS}),
        (FRAME.write_csv(separator="\t"), {"separator": "\\t"}),
        (FRAME.write_csv(separator="\t"), {"separator": "tab"}),
        (FRAME.write_csv(separator="\t"), {"format": "tsv"}),
        (FRAME.write_csv(separator=":"), {"separator": ":"}),
        (TEXT.replace('"a ""red"", pan"', "pan").replace(",", "::"), {}),
        (TEXT.replace('"a ""red"", pan"', "pan").replace(",", "§"), {"separator": "§"}),
        (TEXT.replace("cup", "café").encode("latin-1"), {"encoding": "latin-1"}),
        (TEXT.replace("2024-02-01", "-").replace("cup", "n/a"), {"null_values": ["n/a", "-"]}),
        ("  007  2024  cup\n 7 2025\t pan \n", {"columns": COLUMNS}),
        ('007,1,5" pipe\n7,2,a 4" nail\n', {"columns": COLUMNS, "quote": ""}),
    ],
)
def test_forms_that_are_named(tmp_path: Path, content: str | bytes, form: dict) -> None:
    rows = read(written(tmp_path / "log", content), **form).frame.rows()
    expected = {
        "encoding": [("007", ROWS[0][1], "café"), ROWS[1]],
        "null_values": [("007", ROWS[0][1], None), ("7", None, ROWS[1][2])],
        "quote": [("007", "1", '5" pipe'), ("7", "2", 'a 4" nail')],
    }
    if isinstance(content, str) and content.startswith("  "):
        assert rows == [("007", "2024", "cup"), ("7", "2025", "pan")]
    elif next(iter(reversed(form)), "") in expected:
        assert rows == expected[next(iter(reversed(form)))]
    else:
        assert [row[:2] for row in rows] == [row[:2] for row in ROWS]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "log: file must hold a table, got 0 bytes without one"),
        ("\n\n ", "log: file must hold a table, got 3 bytes"),
        (b"PK\x03\x04..", "got a zip archive or an Excel file; unpack it, or save the sheet as CSV"),
        (b"PAR1....", "log: file must be a complete Parquet file"),
        (b"SQLite format 3\0", "got a SQLite database; read it with data=sql"),
        (
            TEXT.replace("cup", "café").encode("latin-1"),
            "must be UTF-8, got the byte 0xe9 in line 2; name",
        ),
        (TEXT + "1,2,3,4\n", "every line must hold 3 values, got 4 values in line 4: '1,2,3,4'"),
        (TEXT + '1,2,"open\n8,9,10\n', "got a quote that does not close in line 4: '1,2,\"open'; correct it, or set"),
        ('{"who":1}\n{"who":\n', "every line must hold one JSON object, got '{\"who\":' in line 2"),
        ("who,when\n1,2\n", "column 'what' must exist, got columns ..who., .when..; name it"),
        ("who,when,what,what\n1,2,3,4\n", "columns must have different names, got 'what' twice"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(written(tmp_path / "log", content))
    assert "\n" not in str(caught.value)


def test_names_for_another_number_of_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must name the 3 columns of a file without header, got \['who', 'when'\]"):
        read(written(tmp_path / "log", TEXT), columns=["who", "when"])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"format": "xml"}, "format must be one of .*, got 'xml'"),
        ({"encoding": "klingon"}, "encoding must be a known one .*, got 'klingon'"),
        ({"quote": "''"}, "quote must be one character or ''"),
        ({"separator": ""}, "separator must be a character"),
    ],
)
def test_forms_that_make_no_sense(form: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FileForm(**form)


def test_lines_without_a_row_are_left_out_when_asked(tmp_path: Path) -> None:
    content = TEXT + '1,2,3,4\n5,6,"open\n' + "8,9,10\n"
    raw = read(written(tmp_path / "log", content), drop=True)
    assert raw.frame.rows() == [*ROWS, ("8", "9", "10")]
    assert [(line.line, line.reason) for line in raw.bad_lines] == [(4, "4 values"), (5, "a quote that does not close")]
    raw = read(written(tmp_path / "log", gzip.compress(content.encode())), drop=True)
    assert [line.line for line in raw.bad_lines] == [4, 5]
    raw = read(written(tmp_path / "log", FRAME.write_ndjson() + "{\n"), drop=True)
    assert raw.frame.rows() == ROWS and raw.bad_lines[0].line == 3


def test_a_line_break_inside_of_a_value_without_quotes(tmp_path: Path) -> None:
    """It belongs to the value; where lines are looked at one by one, the line holds no row."""
    content = "who,when,what\n1,2,a\rb\n3,4,c\n"
    assert read(written(tmp_path / "log", content)).frame["what"].to_list() == ["a\rb", "c"]
    raw = read(written(tmp_path / "log", content + "5,6,7,8\n"), drop=True)
    assert raw.frame["what"].to_list() == ["c"] and [line.line for line in raw.bad_lines] == [2, 4]


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    packed = gzip.compress((TEXT * 200).encode())
    for content in (packed[: len(packed) // 2], FRAME.write_json()[:-20], arrow(False)[:-30]):
        with pytest.raises(DataError, match=r"log: file must be a complete .* file"):
            read(written(tmp_path / "log", content))


def test_parts(tmp_path: Path) -> None:
    for name in ("b", "a"):
        written(tmp_path / "log" / f"{name}.csv", TEXT.replace("cup", name))
    written(tmp_path / "log" / "_SUCCESS", "")
    raw = read(tmp_path / "log")
    assert raw.frame["what"].to_list()[::2] == ["a", "b"]
    assert raw.place(2) == (str(tmp_path / "log" / "b.csv"), 0)
    assert read(tmp_path / "log" / "*.csv").frame.equals(raw.frame)
    assert read([str(tmp_path / "log" / "b.csv")]).frame["what"][0] == "b"
    written(tmp_path / "log" / "notes.txt", "read me")
    with pytest.raises(DataError, match=r"must hold files of one kind, got \['.csv', '.txt'\]; .*/log/\*.csv"):
        read(tmp_path / "log")


def test_days_that_are_packed_otherwise(tmp_path: Path) -> None:
    """One kind alone would leave the other days out; a day that is there twice would count twice."""
    packed = gzip.compress(TEXT.encode())
    written(tmp_path / "log" / "1.csv", TEXT)
    written(tmp_path / "log" / "2.csv.gz", packed)
    written(tmp_path / "log" / "3.csv.zst", packed)
    every = "or all of them, however they are packed: data.path="
    with pytest.raises(DataError, match=rf"got \['.csv', '.csv.gz', '.csv.zst'\]; .*, {every}'.*/log/\*.csv\*'") as one:
        read(tmp_path / "log")
    pattern = str(one.value).rpartition("data.path=")[2].strip("'")
    assert len(read(pattern).frame) == 3 * len(ROWS)
    (tmp_path / "log" / "later").mkdir()
    (tmp_path / "log" / "3.csv.zst").rename(tmp_path / "log" / "later" / "3.csv.zst")
    with pytest.raises(DataError) as one:
        read(f"{tmp_path}/log/")
    pattern = str(one.value).rpartition("data.path=")[2].strip("'")
    assert pattern == f"{tmp_path}/log/**/*.csv*" and len(read(pattern).frame) == 3 * len(ROWS)
    written(tmp_path / "log" / "2.csv", TEXT)
    with pytest.raises(DataError, match=r"data.path='.*/\*.csv' \(2.csv is there 2 times\)$"):
        read(tmp_path / "log")


@pytest.mark.parametrize("nothing", [b"", b"\xef\xbb\xbf", b" \r\n\n", gzip.compress(b"")])
def test_an_empty_file_among_the_days(tmp_path: Path, nothing: bytes) -> None:
    """The file of a day on which the shop was closed, or one that was not copied: the user has to say."""
    for day in (1, 3):
        written(tmp_path / "log" / f"{day}.csv", TEXT)
    for day in (0, 2):
        (tmp_path / "log" / f"{day}.csv").write_bytes(nothing)
    with pytest.raises(DataError, match=r"0.csv: file must hold a table, got \d+ bytes .*data.on_bad_rows=drop"):
        read(tmp_path / "log")
    raw = read_files(str(tmp_path / "log"), FileForm(), lambda names: names, drop_bad_lines=True)
    assert len(raw.frame) == 4 and raw.place(2)[0].endswith("3.csv")
    assert [(Path(line.file).name, line.reason) for line in raw.bad_lines] == [
        (f"{day}.csv", "nothing, the file is empty") for day in (0, 2)
    ]
    assert len(read_files(str(tmp_path / "log"), FileForm(), lambda names: names, rows=9).frame) == 2
    for day in (1, 3):
        (tmp_path / "log" / f"{day}.csv").write_bytes(nothing)
    with pytest.raises(DataError, match="files must hold a table, got 4 empty ones"):
        read_files(str(tmp_path / "log"), FileForm(), lambda names: names, drop_bad_lines=True)


def test_parts_of_different_dtypes(tmp_path: Path) -> None:
    """Widths of integers may differ, text and numbers may not, and a column that a part lacks is named with it."""
    parts = [tmp_path / f"when=2024-01-0{day}" / "part.parquet" for day in (1, 2)]
    for path, dtype in zip(parts, (pl.Int32, pl.UInt8), strict=True):
        path.parent.mkdir()
        pl.DataFrame({"who": pl.Series([1], dtype=dtype), "what": ["cup"]}).write_parquet(path)
    raw = read(tmp_path)
    assert raw.frame.rows() == [(1, "2024-01-01", "cup"), (1, "2024-01-02", "cup")]
    pl.DataFrame({"who": ["1"], "what": ["cup"]}).write_parquet(parts[1])
    with pytest.raises(DataError, match=r"part.parquet: column 'who' must hold Int32 as in .*-01/part.*got String"):
        read(tmp_path)
    pl.DataFrame({"who": [1]}).write_parquet(parts[1])
    with pytest.raises(DataError, match="column 'what' must exist"):
        read(tmp_path)
    with pytest.raises(DataError, match="table must exist, got no such file"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["7", "-12", None], [7, -12, None]),
        (["007", "7"], ["007", "7"]),
        (["1.0", "2"], [1, 2]),
        (["99999999999999999999"], ["99999999999999999999"]),
        (["1", "x"], ["1", "x"]),
        (["+1", "1"], ["+1", "1"]),
    ],
)
def test_text_is_a_number_where_it_says_the_same(texts: list, expected: list) -> None:
    assert natural(pl.Series(texts), whole_only=True).to_list() == expected


def test_decimals_of_text() -> None:
    assert natural(pl.Series(["1.5", "2", " .5"])).to_list() == [1.5, 2.0, 0.5]
    assert natural(pl.Series(["00017", "00018"])).to_list() == ["00017", "00018"]
