"""The organisers' directory: raw tables to be split, or the result of their split.

product_properties.parquet
raw     <kind>.parquet            everything, to be split here
split   input/<kind>.parquet      events before the train target
        target/{train,validation}_target.parquet   purchases with properties joined
both    input/relevant_clients.npy, target/active_clients.npy, target/{,popularity_}propensity_*.npy   optional
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import polars as pl

from ubp_fast.events.checks import PURCHASE_SCHEMA, event_schema
from ubp_fast.events.formats import said_of
from ubp_fast.events.parse import parse_codes, parse_ids
from ubp_fast.events.read import read_events, read_id_list, read_label_lists, read_products, read_table
from ubp_fast.events.schema import EVENT_KINDS, PRODUCT_TABLE, DataError, UserError
from ubp_fast.events.split import DAY_S, TARGET_DAYS, Split, floor_day, split_at
from ubp_fast.events.times import parse_timestamps
from ubp_fast.events.write import EventWriter, event_writer
from ubp_fast.files import copies_of, file_digest, find_objects, is_url
from ubp_fast.progress import Progress, Steps

LAYOUTS, PARTS = ("auto", "raw", "split"), ("input", "target")


@dataclass(frozen=True)
class Challenge:
    """The organisers' directory as a source.

    Attributes:
        dir: the directory, or its URL in a bucket (s3://...), of which copies are read that are gone afterwards.
        layout: "raw", "split", or "auto": split when `input/` and `target/` hold tables, else raw.
        end: ISO date-time; later events are removed and all windows move. Label lists and active clients of the
            directory belong to other windows then and are left out.
    """

    dir: str
    layout: str = "auto"
    end: str | None = None

    def prepare(self, directory: Path, progress: Progress | None = None, target_days: int = TARGET_DAYS) -> None:
        """Writes the canonical event directory; file order is kept.

        Raises:
            DataError: a table is missing or breaks a rule.
            OutputDirectoryError: `directory` cannot be written.
            UserError: another length of the target windows than the organisers'.
        """
        self.check_days(target_days)
        if self.layout not in LAYOUTS:
            raise UserError(f"Challenge: layout must be one of {list(LAYOUTS)}, got '{self.layout}'")
        if is_url(self.dir):
            with copies_of(self._objects()) as copies, said_of(copies, self.dir.rstrip("/")):
                replace(self, dir=str(copies)).prepare(directory, progress, target_days)
            return
        root = Path(self.dir)
        if not root.is_dir():
            raise DataError(f"{root}: the challenge directory must exist, got no such directory; check data.dir")
        split_layout = self.layout == "split" or (self.layout == "auto" and _is_split(root))
        steps = Steps(progress, len(EVENT_KINDS) + 1)
        with event_writer(directory, "challenge", self.end) as writer:
            split = self._write_split(root, writer, steps) if split_layout else self._write_raw(root, writer, steps)
            self._write_lists(root, writer)
            writer.finish(split, layout="split" if split_layout else "raw")

    def content(self) -> dict[str, str]:
        """Digest of every file of the directory that may be read; other files beside them do not count.

        Of objects in a bucket it is their version.
        """
        if is_url(self.dir):
            versions = find_objects(self.dir)
            return {name: versions[url] for name, url in self._objects(versions).items()}
        root = Path(self.dir)
        found = [*root.glob("*.parquet"), *(root / "input").glob("*"), *(root / "target").glob("*")]
        parts = [part for path in found if path.is_dir() for part in path.rglob("*.parquet")]
        return {str(file.relative_to(root)): file_digest(file) for file in sorted({*found, *parts}) if file.is_file()}

    def _objects(self, found: Iterable[str] | None = None) -> dict[str, str]:
        """Place in the directory -> URL, of all objects that may be read."""
        start = self.dir.rstrip("/") + "/"
        inside = {url.removeprefix(start): url for url in (find_objects(self.dir) if found is None else found)}
        first = {name: PurePosixPath(name).parts[0] for name in inside}
        return {name: url for name, url in inside.items() if first[name] in PARTS or first[name].endswith(".parquet")}

    @staticmethod
    def check_days(target_days: int) -> None:
        """Refuses other target windows than the organisers fixed.

        Raises:
            UserError: `target_days` are not 14.
        """
        if target_days != TARGET_DAYS:
            raise UserError(
                f"Challenge: windows.days must be {TARGET_DAYS}, as the organisers fixed it, got {target_days}"
            )

    def _write_raw(self, root: Path, writer: EventWriter, steps: Steps) -> Split:
        writer.write_products(read_products(root / f"{PRODUCT_TABLE}.parquet"))
        steps.done()
        _write_kinds(root, writer, steps, {})
        return writer.default_split()

    def _write_split(self, root: Path, writer: EventWriter, steps: Steps) -> Split:
        parts = {
            name: _read_target(root / "target" / f"{name}.parquet") for name in ("train_target", "validation_target")
        }
        target = pl.concat(parts.values())
        writer.write_products(_with_target_products(read_products(root / f"{PRODUCT_TABLE}.parquet"), target))
        steps.done()
        last_input_s = _write_kinds(root / "input", writer, steps, {"product_buy": target})
        if self.end is not None:
            return writer.default_split()
        writer.write_target_purchases(target.select(list(PURCHASE_SCHEMA)))
        return _split_of_parts(root, last_input_s, parts["train_target"], parts["validation_target"])

    def _write_lists(self, root: Path, writer: EventWriter) -> None:
        relevant = root / "input" / "relevant_clients.npy"
        if relevant.exists():
            writer.write_clients("relevant_clients", read_id_list(relevant, unique=True))
        active = root / "target" / "active_clients.npy"
        lists = read_label_lists(root / "target")
        if self.end is not None:
            if active.exists() or lists:
                writer.notes.append("target: label lists and active clients belong to another end and are left out")
            return
        if active.exists():
            writer.write_clients("active_clients", read_id_list(active, unique=True))
        if lists:
            writer.write_label_lists(lists)


def _is_split(root: Path) -> bool:
    return (root / "input" / "product_buy.parquet").exists() and (root / "target" / "train_target.parquet").exists()


def _write_kinds(root: Path, writer: EventWriter, steps: Steps, more: dict[str, pl.DataFrame]) -> int:
    """Writes the tables of all kinds, `more` appended; returns the time of the last event in the files."""
    last_s = None
    for kind in EVENT_KINDS:
        path = root / f"{kind}.parquet"
        # A shop may lack any kind but purchases; those are always asked for, so that a wrong directory is noticed.
        if kind == "product_buy" or path.exists():
            for frame in read_events(path, kind):
                if len(frame):
                    file_last_s = int(frame["timestamp_s"].max())  # type: ignore[arg-type]
                    last_s = file_last_s if last_s is None else max(last_s, file_last_s)
                writer.write_events(kind, frame, str(path))
            if kind in more:
                writer.write_events(kind, more[kind].select(list(event_schema(kind))), str(path))
        steps.done()
    return last_s if last_s is not None else 0


def _read_target(path: Path) -> pl.DataFrame:
    """A target table as PURCHASE_SCHEMA and the name codes."""
    raw = read_table(path, ["client_id", "timestamp", "sku", "category", "price", "name"])
    if not len(raw):
        raise DataError(f"{path}: table must hold purchases, got 0 rows; split the raw tables again")
    columns = [parse_ids(str(path), raw[name]) for name in ("client_id", "sku", "category", "price")]
    columns += [parse_timestamps(str(path), raw["timestamp"]), parse_codes(str(path), raw["name"])]
    return pl.DataFrame(columns).select([*PURCHASE_SCHEMA, "name"])


def _with_target_products(products: pl.DataFrame, target: pl.DataFrame) -> pl.DataFrame:
    """Adds skus that only the target tables know (the released product table leaves out those seen first there)."""
    new = target.join(products, on="sku", how="anti", maintain_order="left")
    new = new.unique("sku", keep="first", maintain_order=True)
    return pl.concat([products, new.select(products.columns)])


def _split_of_parts(root: Path, last_input_s: int, train: pl.DataFrame, validation: pl.DataFrame) -> Split:
    """The boundaries that the parts were cut at: by the organisers' rule when it explains the parts, else at midnight.

    The official scoring windows do not follow the rule: their data end ten minutes after a midnight.
    """
    first_s, last_s = _range(train)
    validation_first_s, end_s = _range(validation)
    for earlier, time_s, later, limit_s in (
        ("input", last_input_s, "target/train_target.parquet", first_s),
        ("target/train_target.parquet", last_s, "target/validation_target.parquet", validation_first_s),
    ):
        if time_s > limit_s:
            raise DataError(
                f"{root}: events of {earlier} must lie before those of {later} (first: {limit_s} s), got one at"
                f" {time_s} s; the inputs would show the answers, split the raw tables again"
            )
    rule = split_at(end_s)
    if last_input_s < rule.input_end_s <= first_s and last_s < rule.validation_start_s <= validation_first_s:
        return rule
    input_end_s = floor_day(first_s) if floor_day(first_s) > last_input_s else first_s
    validation_start_s = input_end_s + TARGET_DAYS * DAY_S
    if not last_s < validation_start_s <= validation_first_s:
        midnight_s = floor_day(validation_first_s)
        validation_start_s = midnight_s if midnight_s > last_s else validation_first_s
    return Split(input_end_s, validation_start_s, end_s)


def _range(frame: pl.DataFrame) -> tuple[int, int]:
    times = frame["timestamp_s"].to_numpy()
    return int(times.min()), int(times.max())
