"""Tables in the files that shops have: what a file is follows from its content, not from its name.

    Parquet, Arrow (Feather)   columns as they are
    text                       separator, encoding, line ends and compression are looked up in the file; every column is
                               text, `natural` makes numbers of it
    JSON                       a line or an element of one list per row

A table may be one file, a list of them, a pattern (`logs/*.csv`) or a directory of parts; names of directories such as
`day=2024-01-31` are columns. Parts follow each other in the order of their names. Objects of a bucket (`s3://...`) are
read like files, each from a copy that is gone afterwards.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import itertools
import json
import mmap
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple, TypeVar, cast

import polars as pl

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.files import copies_of, find_objects, is_pattern, is_url

FORMATS = ("parquet", "arrow", "csv", "json")
SEPARATORS = {
    "tab": "\t",
    "\\t": "\t",
    "comma": ",",
    "semicolon": ";",
    "pipe": "|",
    "space": " ",
    "\\x01": "\x01",
    "whitespace": "whitespace",
}
_GUESSED_SEPARATORS = (",", "\t", ";", "|", "\x01", "::", "whitespace")
_UNIT_SEPARATOR = "\x1f"
_DATA_NAME = re.compile(
    r"(^[^.]+|\.(parquet|pq|arrow|feather|ipc|csv|tsv|tab|txt|dat|data|log|json|jsonl|ndjson|inter))(\.(gz|zst|zstd))?$",
    re.IGNORECASE,
)
_PACKED = (".gz", ".zst", ".zstd")
_SAMPLE_BYTES = 1 << 20
_SAMPLE_LINES = 200
# Of blank lines, or of a packed file without content.
_MOST_BYTES_OF_NOTHING = 1024
# A quoted text that spans more lines was not closed.
_MOST_LINES_OF_A_ROW = 100
OPEN_QUOTE = "a quote that does not close"
_MAGIC = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow stream",
}
_UNREAD = {
    b"PARE": ("an encrypted Parquet file", "decrypt it first"),
    b"FEA1": ("a Feather file of version 1", "write it again as version 2 or as Parquet"),
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it, or save the sheet as CSV"),
    b"\xd0\xcf\x11\xe0": ("an old Excel file", "save the sheet as CSV"),
    b"SQLite format 3": ("a SQLite database", "read it with data=sql"),
    b"BZh": ("compressed with bzip2", "unpack it first"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it first"),
    b"Obj\x01": ("an Avro file", "write it as Parquet"),
    b"ORC": ("an ORC file", "write it as Parquet"),
    b"%PDF": ("a PDF file", "export the table as CSV"),
}
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_WHOLE = r"^(?:0|-?[1-9]\d*)(?:\.0+)?$"
_DECIMAL = r"^\s*[+-]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s*$"


# Names of all columns of a file -> those to read; raises a DataError when they are not there.
Wanted = Callable[[list[str]], Sequence[str]]


class BadLine(NamedTuple):
    """A line of a text file that holds no row, counted from 1."""

    file: str
    line: int
    text: str
    reason: str


@dataclass(frozen=True)
class FileForm:
    """How the files of a table are written; None means that the file says it.

    Attributes:
        format: one of `FORMATS`.
        separator: between the values of a text line: any text, or "tab", "comma", "semicolon", "pipe", "space",
            "whitespace" (any number of spaces and tabs).
        columns: names of the columns of text files without a header.
        encoding: of text, such as "latin-1".
        quote: character around texts that hold a separator; "" when quotes are plain text.
        null_values: texts that stand for a missing value, beside nothing at all.

    Raises:
        UserError: an unknown format or encoding, a quote of several characters, no separator.
    """

    format: str | None = None
    separator: str | None = None
    columns: Sequence[str] | None = None
    encoding: str | None = None
    quote: str = '"'
    null_values: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.format == "tsv":
            object.__setattr__(self, "format", "csv")
            object.__setattr__(self, "separator", self.separator or "tab")
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"source: format must be one of {[*FORMATS, 'tsv']}, got '{self.format}'")
        if self.separator == "":
            raise UserError("source: separator must be a character or one of its names, got nothing")
        if len(self.quote) > 1:
            raise UserError(f"source: quote must be one character or '', got '{self.quote}'")
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError as error:
                raise UserError(
                    f"source: encoding must be a known one such as 'utf-8' or 'latin-1', got '{self.encoding}'"
                ) from error


@dataclass(frozen=True)
class RawTable:
    """A table as its files hold it.

    Attributes:
        name: for messages.
        frame: its columns; those of text files are text.
        files: names of the files, and the number of rows of each.
        is_text: True when every value was text in the file.
        bad_lines: lines that hold no row.
    """

    name: str
    frame: pl.DataFrame
    files: tuple[tuple[str, int], ...]
    is_text: bool = False
    bad_lines: tuple[BadLine, ...] = ()

    def place(self, row: int) -> tuple[str, int]:
        """File of a row of `frame`, and the row's number in it."""
        for name, rows in self.files:
            if row < rows:
                return name, row
            row -= rows
        raise IndexError(row)


def find_files(paths: str | Sequence[str]) -> list[tuple[Path | str, dict[str, str]]]:
    """Files of a table, with the columns that the names of their directories give (`day=2024-01-31`).

    Args:
        paths: a file, a pattern, a directory, the URL of such in a bucket, or a list of those.

    Returns:
        Paths, and URLs of objects.

    Raises:
        DataError: there is none, or a directory holds files of several kinds of names.
        ObjectError: a bucket cannot be read.
    """
    if not isinstance(paths, str):
        return [found for path in paths for found in find_files(path)]
    files: list[tuple[Path | str, PurePath]]
    if is_url(paths):
        urls, start = list(find_objects(paths)), paths.rstrip("/") + "/"
        if urls == [paths]:
            return [(paths, {})]
        if is_pattern(paths):
            files = [(url, PurePosixPath(url)) for url in urls]
        else:
            files = _of_one_kind(paths, [(url, PurePosixPath(url.removeprefix(start))) for url in urls])
    elif (root := Path(paths)).is_file():
        return [(root, {})]
    elif root.is_dir():
        inside = sorted(path for path in root.rglob("*") if path.is_file())
        files = _of_one_kind(paths, [(path, path.relative_to(root)) for path in inside])
    else:
        files = [(Path(found), Path(found)) for found in sorted(glob.glob(paths, recursive=True))]
        files = [(file, place) for file, place in files if Path(file).is_file()]
    if not files:
        raise DataError(f"{paths}: table must exist, got no such file; check the directory and the file's name")
    return [(file, _given(place.parent)) for file, place in files]


F = TypeVar("F", bound=Path | str)


def _of_one_kind(paths: str, inside: Sequence[tuple[F, PurePath]]) -> list[tuple[F, PurePath]]:
    """Those of the files in a directory that are data, by their places in it."""
    files = [(file, place) for file, place in inside if not _is_hidden(place) and _DATA_NAME.search(place.name)]
    suffixes = sorted({_suffix(place) for _, place in files})
    if len(suffixes) > 1:
        folder = f"{paths.rstrip('/')}/" + ("" if all(len(place.parts) == 1 for _, place in files) else "**/")
        remedy = f"name those that are meant, such as data.path='{folder}*{suffixes[0]}'"
        unpacked = [str(place.with_suffix("") if place.suffix in _PACKED else place) for _, place in files]
        twice = next((name for name in unpacked if unpacked.count(name) > 1), None)
        if twice is not None:
            remedy += f" ({twice} is there {unpacked.count(twice)} times)"
        elif len(kinds := {_suffix(PurePath(name)) for name in unpacked}) == 1:
            remedy += f", or all of them, however they are packed: data.path='{folder}*{kinds.pop()}*'"
        raise DataError(f"{paths}: the directory must hold files of one kind, got {suffixes}; {remedy}")
    return files


def _given(folder: PurePath) -> dict[str, str]:
    return dict(part.split("=", 1) for part in folder.parts if "=" in part)


def _suffix(path: PurePath) -> str:
    """The end of a file's name that tells its kind, with that of the packer."""
    return "".join(path.suffixes[-2:] if path.suffix in _PACKED else path.suffixes[-1:])


def _is_hidden(path: PurePath) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def read_files(
    paths: str | Sequence[str],
    form: FileForm,
    wanted: Wanted,
    drop_bad_lines: bool = False,
    rows: int | None = None,
) -> RawTable:
    """Reads some columns of a table.

    Args:
        paths: see `find_files`.
        form: what is known of the files.
        wanted: see `Wanted`.
        drop_bad_lines: leave lines of text out that hold no row, instead of refusing the file.
        rows: only the first rows of the first file.

    Raises:
        DataError: no such file, one that cannot be read, a column that is missing, or parts whose columns do not fit.
    """
    found = find_files(paths)
    if rows is not None:
        found = list(itertools.islice((one for one in found if not _is_empty(one[0])), 1)) or found[:1]
    frames: list[pl.DataFrame] = []
    bad_lines: list[BadLine] = []
    kinds, names = [], []
    for file, given in found:
        with _at_hand(file) as path:
            if len(found) > 1 and _is_empty(path):
                if not drop_bad_lines:
                    raise DataError(
                        f"{file}: file must hold a table, got {path.stat().st_size} bytes without one; remove it or"
                        " copy it again, or leave such files out with data.on_bad_rows=drop"
                    )
                bad_lines.append(BadLine(str(file), 1, "", "nothing, the file is empty"))
                continue
            names.append(str(file))
            kinds.append(form.format or content_of(path))
            bad: list[BadLine] = []
            frames.append(_read_file(path, kinds[-1], form, given, wanted, drop_bad_lines, bad, rows))
            bad_lines += [line._replace(file=str(file)) for line in bad]
    if not names:
        raise DataError(f"{paths}: files must hold a table, got {len(found)} empty ones; check the files")
    frame = frames[0] if len(frames) == 1 else _joined(names, frames)
    files = tuple((name, len(part)) for name, part in zip(names, frames, strict=True))
    name = paths if isinstance(paths, str) else names[0]
    return RawTable(name, frame, files, set(kinds) == {"csv"}, tuple(bad_lines))


@contextmanager
def _at_hand(file: Path | str) -> Iterator[Path]:
    """A file, or a copy of an object; errors name the object."""
    if isinstance(file, Path):
        yield file
        return
    name = file.rpartition("/")[2]
    with copies_of({name: file}) as folder, said_of(folder, file.rpartition("/")[0]):
        yield folder / name


@contextmanager
def said_of(copies: Path, url: str) -> Iterator[None]:
    """Errors that name copies of objects name the objects."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace(str(copies), url)) from error


def _read_file(
    path: Path,
    kind: str,
    form: FileForm,
    given: dict[str, str],
    wanted: Wanted,
    drop: bool,
    bad_lines: list[BadLine],
    rows: int | None,
) -> pl.DataFrame:
    with readable(path, kind):
        if kind == "csv":
            return _read_text(path, form, given, wanted, drop, bad_lines, rows)
        scan = _scan(path, kind, drop, bad_lines)
        names = scan.collect_schema().names()
        columns = list(wanted([*names, *(name for name in given if name not in names)]))
        scan = cast(pl.LazyFrame, _with_given(scan, given, names)).select(columns)
        return (scan if rows is None else scan.head(rows)).collect()


def _joined(names: Sequence[str], frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Parts one below the other; integer and floating columns take the wider dtype.

    Raises:
        DataError: a column is text in one part and a number in another.
    """
    for column in frames[0].columns:
        first = frames[0][column].dtype
        for name, frame in zip(names, frames, strict=True):
            dtype = frame[column].dtype
            if pl.Null not in (first, dtype) and first.is_numeric() != dtype.is_numeric():
                raise DataError(
                    f"{name}: column '{column}' must hold {first} as in {names[0]}, got {dtype};"
                    " write all parts with the same types"
                )
    try:
        return pl.concat(frames, how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        schemas = [frame.schema for frame in frames]
        name = next(name for name, schema in zip(names, schemas, strict=True) if schema != schemas[0])
        raise DataError(
            f"{name}: columns must have the same types as in {names[0]}, got {error}; write all parts alike"
        ) from error


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """What goes wrong while a file is read becomes an error that names it."""
    try:
        yield
    except PermissionError:  # says enough, and no copy helps
        raise
    except (pl.exceptions.PolarsError, OSError, EOFError, csv.Error, zlib.error) as error:
        reason = str(error).strip().split("\n")[0]
        if "utf-8" in reason.lower() or "utf8" in reason.lower():
            raise _not_utf8(path, error) from error
        raise DataError(
            f"{path}: file must be a complete {_KIND_NAMES.get(kind, kind)} file, got '{reason}'; it may be truncated:"
            " copy or make it again"
        ) from error


_KIND_NAMES = {"parquet": "Parquet", "arrow": "Arrow", "arrow stream": "Arrow", "csv": "CSV", "json": "JSON"}


def content_of(path: Path) -> str:
    """What a file holds: "parquet", "arrow", "arrow stream", "json" or "csv".

    Raises:
        DataError: nothing, or something that is not read.
    """
    with readable(path, "table"):
        with path.open("rb") as file:
            head = file.read(16)
        for magic, kind in _MAGIC.items():
            if head.startswith(magic):
                return kind
        for magic, (what, remedy) in _UNREAD.items():
            if head.startswith(magic):
                raise DataError(f"{path}: file must be a table, got {what}; {remedy}")
        sample = _decoded(path, _head(path), None).lstrip()
    if not sample:
        raise DataError(f"{path}: file must hold a table, got {path.stat().st_size} bytes without one; check the file")
    return "json" if re.match(r"\{\s*(\"|\}|$)|\[\s*(\{|\]|$)", sample) else "csv"


def _head(path: Path) -> bytes:
    """The first bytes of a text, unpacked."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start.startswith(_GZIP):
            with gzip.open(file) as unpacked:
                return unpacked.read(_SAMPLE_BYTES)
        if start.startswith(_ZSTD):
            return _lines_of(path, _SAMPLE_LINES)
        return file.read(_SAMPLE_BYTES)


def _is_empty(file: Path | str) -> bool:
    """Whether a file holds nothing but blanks, packed or not; objects of a bucket are looked at when they are read."""
    if isinstance(file, str) or file.stat().st_size > _MOST_BYTES_OF_NOTHING:
        return False
    with readable(file, "table"):
        return not _decoded(file, _head(file), None).strip("\ufeff \t\r\n")


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith((_GZIP, _ZSTD))


def _whole(path: Path) -> bytes:
    """All bytes of a text, unpacked."""
    content = path.read_bytes()
    if content.startswith(_GZIP):
        return gzip.decompress(content)
    return _lines_of(path) if content.startswith(_ZSTD) else content


def _lines_of(path: Path, count: int | None = None) -> bytes:
    """Lines of a file that Polars unpacks."""
    lines = pl.read_csv(
        path, has_header=False, separator=_UNIT_SEPARATOR, quote_char=None, infer_schema=False, n_rows=count,
        new_columns=["line"], truncate_ragged_lines=True,
    )  # fmt: skip
    return "".join(f"{line or ''}\n" for line in lines["line"]).encode()


def _encoding(content: bytes) -> str | None:
    """Name of the encoding that a mark or zero bytes give away; None for UTF-8 without a mark."""
    for mark, name in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if content.startswith(mark):
            return name
    start = content[:2000]
    if start[1::2].count(0) > len(start) // 4:
        return "utf-16-le"
    return "utf-16-be" if start[::2].count(0) > len(start) // 4 else None


def _decoded(path: Path, content: bytes, encoding: str | None) -> str:
    """The text of the first bytes of a file; a character that the end cuts in two is left out."""
    name = encoding or _encoding(content) or "utf-8"
    return content.decode(name, errors="replace")


def _not_utf8(path: Path, error: Exception) -> DataError:
    content = _whole(path)
    try:
        content.decode()
    except UnicodeDecodeError as bad:
        line = content.count(b"\n", 0, bad.start) + 1
        return DataError(
            f"{path}: text must be UTF-8, got the byte 0x{content[bad.start]:02x} in line {line}; name its encoding,"
            " such as data.encoding=latin-1 or data.encoding=cp1252"
        )
    return DataError(f"{path}: file must be a complete file, got '{error}'; copy or make it again")


def _scan(path: Path, kind: str, drop_bad_lines: bool, bad_lines: list[BadLine]) -> pl.LazyFrame:
    if kind == "parquet":
        return pl.scan_parquet(path, hive_partitioning=False)
    if kind == "arrow":
        return pl.scan_ipc(path, hive_partitioning=False)
    if kind == "arrow stream":
        return pl.read_ipc_stream(path).lazy()
    return _read_json(path, drop_bad_lines, bad_lines).lazy()


def _read_json(path: Path, drop: bool, bad_lines: list[BadLine]) -> pl.DataFrame:
    """A list of objects, or an object per line.

    Raises:
        DataError: a line that is no object; names it.
    """
    head = _head(path)
    is_plain = _encoding(head) is None and not _is_packed(path)
    source = path if is_plain else io.StringIO(_decoded_whole(path, None))
    if _decoded(path, head, None).lstrip("\ufeff \t\r\n").startswith("["):
        return pl.read_json(source, infer_schema_length=None)
    try:
        return pl.read_ndjson(source, infer_schema_length=None)
    except pl.exceptions.PolarsError:
        good, text = [], _decoded_whole(path, None)
        for number, line in enumerate(text.split("\n")):
            if not line.strip():
                continue
            try:
                if not isinstance(json.loads(line), dict):
                    raise ValueError("not an object")
                good.append(line)
            except ValueError as error:
                if not drop:
                    raise DataError(
                        f"{path}: every line must hold one JSON object, got {_short(line)} in line {number + 1}"
                        f" ({error}); correct that line, or leave such lines out with data.on_bad_rows=drop"
                    ) from error
                bad_lines.append(BadLine(str(path), number + 1, line, str(error)))
        if not bad_lines or not good:
            raise
        return pl.read_ndjson(io.StringIO("\n".join(good)), infer_schema_length=None)


def _decoded_whole(path: Path, encoding: str | None) -> str:
    content = _whole(path)
    name = encoding or _encoding(content) or "utf-8"
    try:
        return content.decode(name).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if name == "utf-8":
            raise _not_utf8(path, error) from error
        raise DataError(
            f"{path}: text must be {name}, got the byte 0x{content[error.start]:02x} at byte {error.start};"
            " name its encoding in data.encoding"
        ) from error


def _with_given(
    frame: pl.LazyFrame | pl.DataFrame, given: dict[str, str], names: Sequence[str]
) -> pl.LazyFrame | pl.DataFrame:
    new = {name: value for name, value in given.items() if name not in names}
    return frame.with_columns([pl.lit(value).alias(name) for name, value in new.items()]) if new else frame


@dataclass(frozen=True)
class _Text:
    """A text file that Polars can read: its UTF-8 content or the file that holds it, and how lines fall into values."""

    path: Path
    source: Path | bytes
    separator: str
    eol: str
    names: list[str]
    form: FileForm

    def content(self) -> str:
        return self.source.decode() if isinstance(self.source, bytes) else _decoded_whole(self.source, None)

    @property
    def quoting(self) -> dict[str, Any]:
        """For the reader of the standard library."""
        return {"quotechar": self.form.quote} if self.form.quote else {"quoting": csv.QUOTE_NONE}


def _text_of(path: Path, form: FileForm, wanted: Wanted) -> _Text:
    head = _head(path)
    encoding = form.encoding or _encoding(head)
    sample = _decoded(path, head, encoding).removeprefix("\ufeff")
    eol = "\n" if "\n" in sample else "\r"
    separator = separator_of(sample, form, wanted)
    names = _header(path, sample, form, separator)
    is_utf8 = encoding is None or encoding.lower().replace("_", "-") in ("utf-8", "utf-8-sig", "utf8", "ascii")
    if is_utf8 and len(separator.encode()) == 1 and not _is_packed(path):
        return _Text(path, path, separator, eol, names, form)
    text = _decoded_whole(path, encoding)
    if separator == "whitespace":
        text = eol.join(_UNIT_SEPARATOR.join(line.split()) for line in text.split(eol))
    elif len(separator.encode()) > 1:
        text = text.replace(separator, _UNIT_SEPARATOR)
    separator = separator if len(separator.encode()) == 1 else _UNIT_SEPARATOR
    return _Text(path, text.encode(), separator, eol, names, form)


def _header(path: Path, sample: str, form: FileForm, separator: str) -> list[str]:
    """Names of the columns.

    Raises:
        DataError: `form.columns` are not as many as the file has.
    """
    first = next(_sample_rows(sample, separator, form.quote), [])
    if form.columns is None:
        return [name.strip() for name in first]
    if len(form.columns) != len(first):
        raise DataError(
            f"{path}: data.columns must name the {len(first)} columns of a file without header, got"
            f" {list(form.columns)}; its first line holds {first}"
        )
    return list(form.columns)


def _read_text(
    path: Path,
    form: FileForm,
    given: dict[str, str],
    wanted: Wanted,
    drop: bool,
    bad_lines: list[BadLine],
    rows: int | None,
) -> pl.DataFrame:
    """Columns of a text file, all of them text; blank lines are left out."""
    text = _text_of(path, form, wanted)
    columns = list(wanted([*text.names, *(name for name in given if name not in text.names)]))
    twice = [name for name in columns if text.names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: columns must have different names, got '{twice[0]}' twice; rename one of them")
    places = [place for place, name in enumerate(text.names) if name in columns]
    frame = None if _has_open_quote(text.source, form.quote) else _read_csv(text, places, rows)
    if frame is None:
        lines = _rows_of_lines(text, drop, bad_lines)
        frame = pl.DataFrame([pl.Series(str(place), [line[place] for line in lines], pl.String) for place in places])
    frame.columns = [text.names[place] for place in places]
    missing = ["", *form.null_values]
    frame = frame.select(pl.when(~pl.all().cast(pl.String).is_in(missing)).then(pl.all()))
    frame = frame.filter(~pl.all_horizontal(pl.all().is_null())) if places else frame
    return cast(pl.DataFrame, _with_given(frame, given, text.names)).select(columns)


def _read_csv(text: _Text, places: list[int], rows: int | None) -> pl.DataFrame | None:
    """The chosen columns; None when some lines have to be looked at one by one."""
    try:
        # All columns are read: lines with too many values pass where the last column is not asked for.
        frame = pl.read_csv(
            text.source,
            infer_schema=False,
            n_rows=rows,
            has_header=text.form.columns is None,
            separator=text.separator,
            quote_char=text.form.quote or None,
            eol_char=text.eol,
            raise_if_empty=False,
        )
    except pl.exceptions.PolarsError as error:
        if "utf-8" in str(error).lower():
            raise
        return None
    return frame[:, places] if frame.width == len(text.names) else None


def separator_of(sample: str, form: FileForm, wanted: Wanted) -> str:
    """The separator that `form` names, or the one by which the first lines fall into columns of the wanted names."""
    if form.separator is not None:
        return SEPARATORS.get(form.separator.lower(), form.separator)
    best, best_score = ",", (False, False, 1)
    for separator in _GUESSED_SEPARATORS:
        rows = list(_sample_rows(sample, separator, form.quote))
        if not rows or len(rows[0]) < 2:
            continue
        if separator == "whitespace" and best_score[1]:
            break  # spaces inside of values
        is_even = len({len(row) for row in rows}) == 1
        score = (_has_wanted(rows[0], form, wanted), is_even, len(rows[0]))
        if score > best_score:
            best, best_score = separator, score
    return best


def _has_wanted(names: list[str], form: FileForm, wanted: Wanted) -> bool:
    """True when the first line of a file, or the given names, are as many and those that are asked for."""
    if form.columns is not None:
        return len(form.columns) == len(names)
    try:
        wanted([name.strip() for name in names])
    except DataError:
        return False
    return True


def _sample_rows(sample: str, separator: str, quote: str) -> Iterator[list[str]]:
    """Values of the first lines that are whole and not blank."""
    lines = sample.split("\n" if "\n" in sample else "\r")[: _SAMPLE_LINES + 1]
    lines = [line.rstrip("\r").replace("\r", " ") for line in (lines[:-1] if len(lines) > 1 else lines)]
    lines = [line for line in lines if line.strip()]
    if separator == "whitespace":
        return iter([line.split() for line in lines])
    if len(separator) > 1:
        return iter([line.split(separator) for line in lines])
    quoting: dict[str, Any] = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    return csv.reader(lines, delimiter=separator, **quoting)


def _has_open_quote(source: Path | bytes, quote: str) -> bool:
    """True when quotes do not come in pairs: a text that does not end would take the lines that follow it."""
    if not quote:
        return False
    mark = quote.encode()
    if isinstance(source, bytes):
        return source.count(mark) % 2 == 1
    if not source.stat().st_size:
        return False
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        count = 0
        for start in range(0, len(content), 1 << 24):
            count += content[start : start + (1 << 24)].count(mark)
    return count % 2 == 1


def _rows_of_lines(text: _Text, drop: bool, bad_lines: list[BadLine]) -> list[list[str]]:
    """Rows of a text that has lines which hold none: too many values, or a quote that does not close.

    Raises:
        DataError: there is such a line, and they are not to be left out.
    """
    quote, width = text.form.quote, len(text.names)
    lines = [line.rstrip("\r") if text.eol == "\n" else line for line in text.content().split(text.eol)]
    rows: list[list[str]] = []
    number = 0 if text.form.columns is not None else next(at for at, line in enumerate(lines) if line.strip()) + 1
    while number < len(lines):
        last, is_open = number + 1, bool(quote) and lines[number].count(quote) % 2 == 1
        while is_open and last < len(lines) and last - number < _MOST_LINES_OF_A_ROW:
            is_open = lines[last].count(quote) % 2 == 0
            last += 1
        row, problem = ([], OPEN_QUOTE) if is_open else _values("\n".join(lines[number:last]), text)
        if problem or any(row[width:]):
            what = problem or f"{len(row)} values"
            remedy = " or set data.quote='' where quotes are plain text," if problem == OPEN_QUOTE else ""
            if not drop:
                raise DataError(
                    f"{text.path}: every line must hold {width} values, got {what} in line {number + 1}:"
                    f" {_short(lines[number])}; correct it,{remedy} or leave such lines out with data.on_bad_rows=drop"
                )
            bad_lines.append(BadLine(str(text.path), number + 1, lines[number], what))
            number += 1
            continue
        if row:
            rows.append(row[:width] + [""] * (width - len(row)))
        number = last
    return rows


def _values(line: str, text: _Text) -> tuple[list[str], str]:
    """The values of a line, and why it holds none."""
    try:
        return next(csv.reader([line], delimiter=text.separator, **text.quoting), []), ""
    except csv.Error as error:
        return [], str(error).split(" - ")[0]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def natural(column: pl.Series, whole_only: bool = False) -> pl.Series:
    """A column of a text file as numbers where every value is one that says the same as its text.

    `007` is no number, and `1.0` is 1.

    Args:
        column: text.
        whole_only: integers only.
    """
    known = column.drop_nulls()
    if not len(known):
        return column
    if known.str.contains(_WHOLE).all():
        numbers = column.str.replace(r"\.0+$", "").cast(pl.Int64, strict=False)
        if numbers.null_count() == column.null_count():
            return numbers
    if not whole_only and known.str.contains(_DECIMAL).all():
        return column.str.strip_chars().cast(pl.Float64, strict=False)
    return column
