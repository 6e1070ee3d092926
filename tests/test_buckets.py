"""Objects of a bucket: events are read from it and profiles put into it, against a server that speaks S3."""

from __future__ import annotations

import errno
import gc
import json
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest
from fsspec.asyn import sync
from fsspec.implementations.memory import MemoryFileSystem
from support.runs import CLOSED_FORMS, SMALL, composed, contents, run_tiny

from ubp_fast.cli import main
from ubp_fast.events.formats import FileForm, read_files
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.events.sources.table import Table
from ubp_fast.files import ObjectError, OutputDirectoryError, bucket_of, copies_of, find_objects
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.profiles import publishing
from ubp_fast.profiles.publishing import MANIFEST_FILE, publish

BUCKET = "s3://shop"
S3FileSystem = pytest.importorskip("s3fs").S3FileSystem
pytest.importorskip("moto")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            _wait_for(port, server)
            with bucket_of(BUCKET) as (system, path):
                system.mkdir(path)
            yield BUCKET
            _close_sessions()
        finally:
            server.kill()
            server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < end_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server of objects did not start")


def _close_sessions() -> None:
    """Those of s3fs, which itself gives up after a tenth of a second; what it still left open is collected here."""
    for system in S3FileSystem._cache.values():
        if system._s3 is not None:
            sync(system.loop, system._s3creator.__aexit__, None, None, None)
    S3FileSystem.clear_instance_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def put(folder: Path, url: str) -> None:
    with bucket_of(url) as (system, path):
        for file in (one for one in folder.rglob("*") if one.is_file()):
            system.put_file(str(file), f"{path}/{file.relative_to(folder)}")


def objects_in(url: str) -> dict[str, bytes]:
    with bucket_of(url) as (system, path):
        system.invalidate_cache()
        return {name.removeprefix(f"{path}/"): system.cat_file(name) for name in system.find(path)}


def test_tables_are_read_like_files(bucket: str, tmp_path: Path) -> None:
    for day in (1, 2):
        (tmp_path / f"day={day}").mkdir()
        pl.DataFrame({"client_id": [day, 7], "sku": [3, 4]}).write_csv(tmp_path / f"day={day}" / "part.csv")
    (tmp_path / "_SUCCESS").touch()
    put(tmp_path, f"{bucket}/logs")
    for place in ("", "/**/*.csv", "/day=?/part.csv", "/day=2/part.csv"):
        local, there = (read_files(f"{at}{place}", FileForm(), list) for at in (tmp_path, f"{bucket}/logs"))
        assert there.frame.equals(local.frame)
        assert there.frame.width == 2 + (place != "/day=2/part.csv")
        assert [rows for _, rows in there.files] == [rows for _, rows in local.files]
    assert there.files[0][0] == f"{bucket}/logs/day=2/part.csv"
    versions = [Table(path=f"{bucket}/logs").content()]
    (tmp_path / "day=2" / "part.csv").write_text("client_id,sku\n2,3\n7,5\n")  # as long as before
    put(tmp_path, f"{bucket}/logs")
    versions.append(Table(path=f"{bucket}/logs").content())
    assert [name for name in versions[0] if versions[0][name] != versions[1][name]] == [there.files[0][0]]


def test_errors_name_the_object(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n1,2,3,4\n")
    put(tmp_path, f"{bucket}/bad")
    with pytest.raises(
        DataError, match=f"^{bucket}/bad/bad.csv: every line must hold 2 values, got 4 values in line 3"
    ):
        read_files(f"{bucket}/bad/bad.csv", FileForm(), list)
    bad = read_files(f"{bucket}/bad/bad.csv", FileForm(), list, drop_bad_lines=True).bad_lines
    assert [(line.file, line.line) for line in bad] == [(f"{bucket}/bad/bad.csv", 3)]
    with pytest.raises(DataError, match=f"{bucket}/none: table must exist, got no such file"):
        read_files(f"{bucket}/none", FileForm(), list)
    said = r"s3://elsewhere/x: objects must be there .* got 'The specified bucket does not"
    with pytest.raises(ObjectError, match=said), bucket_of("s3://elsewhere/x") as (system, path):
        system.cat_file(path)


class Refusing(MemoryFileSystem):
    """A store whose reads and copies end with an error."""

    protocol, error = "refusing", OSError()

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise self.error

    cat_file = get = _refuse


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("ours"), TypeError("ours")]
)
def test_a_full_disk_and_our_mistakes_are_no_errors_of_the_store(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation(Refusing.protocol, Refusing, clobber=True)
    monkeypatch.setattr(Refusing, "error", error)
    with pytest.raises(type(error)) as raised, bucket_of("refusing://shop/x") as (system, path):
        system.cat_file(path)
    assert raised.value is error
    refused = PermissionError(errno.EACCES, "Access Denied")  # s3fs says it so
    monkeypatch.setattr(Refusing, "error", refused)
    with (
        pytest.raises(ObjectError, match="refusing://shop/x: objects must be there and allowed"),
        bucket_of("refusing://shop/x") as (system, path),
    ):
        system.cat_file(path)


def test_copies_that_find_no_space_name_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation(Refusing.protocol, Refusing, clobber=True)
    monkeypatch.setattr(Refusing, "error", OSError(errno.ENOSPC, "No space left on device"))
    said = r"the folder of temporary files \(TMPDIR\) must be a writable directory with free space"
    with pytest.raises(OutputDirectoryError, match=said), copies_of({"x": "refusing://shop/x"}):
        pass


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ObjectError, match=r"gs://shop/x: such addresses need a library, .*gcsfs for gs://"):
        find_objects("gs://shop/x")


@pytest.mark.parametrize("name", ["input/../../notes.parquet", "/notes.parquet"])
def test_no_object_is_written_outside_the_copies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with bucket_of(f"memory://shop/{name}") as (system, path):
        system.pipe_file(path, b"theirs")
    with pytest.raises(ObjectError, match="objects must lie inside their folder"), copies_of({name: path}):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_run_from_bucket_to_bucket(bucket: str, tmp_path: Path) -> None:
    """Events, profiles and model are those of files; what is published is what the run shows, and is sent once."""
    put(SMALL, f"{bucket}/challenge")
    for url, directory in ((f"{bucket}/challenge", tmp_path / "remote"), (str(SMALL), tmp_path / "local")):
        Challenge(url).prepare(directory)
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    arguments = ("data=challenge", f"data.dir={bucket}/challenge", "stages=profiles", f"publish={bucket}/out")
    code, run, said = run_tiny(tmp_path / "runs", *arguments, "compute.shards=2")
    assert code == 0, said
    found = objects_in(f"{bucket}/out")
    manifest = json.loads(found.pop(MANIFEST_FILE))
    assert [*found] == [part["name"] for part in manifest["parts"]]
    assert [*found.values()] == [(run / "profiles.parquet").read_bytes()]
    assert manifest["profile"] == json.loads((run / "profiles" / "profile.json").read_text())
    assert f"{manifest['clients']:,} vectors are in {bucket}/out" in said and "publish done in" in said


def test_profiles_take_the_place_of_others_in_one_step(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of the manifest before stay for its readers, older ones go; what is there is not sent again."""
    url, touched, seen = f"{bucket}/steps/", list[str](), list[tuple[int, int]]()

    def noted(place: str) -> Any:
        touched.append(place)
        return bucket_of(place)

    monkeypatch.setattr(publishing, "bucket_of", noted)
    table, layout = tmp_path / "profiles.parquet", tmp_path / "profile.json"
    table.mkdir()
    layout.write_text("{}")

    def put_table(*rows: int) -> list[str]:
        for number, count in enumerate(rows):
            pl.DataFrame({"client_id": range(count)}).write_parquet(table / f"part-{number:05d}.parquet")
        touched.clear()
        manifest = publish(table, layout, url, lambda done, parts: seen.append((done, parts)))
        assert manifest["clients"] == sum(rows)
        assert [pl.read_parquet(objects_in(url)[part["name"]]).height for part in manifest["parts"]] == [*rows]
        return [part["name"] for part in manifest["parts"]]

    def names() -> set[str]:
        return {*objects_in(url)} - {MANIFEST_FILE}

    first = put_table(3, 4)
    assert names() == {*first}
    second = put_table(3, 5)
    assert second[0] == first[0] and names() == {*first, *second}
    assert [place for place in touched if place.endswith(".parquet")] == [f"{bucket}/steps/{second[1]}"]
    third = put_table(6, 7)
    assert names() == {*second, *third}
    with bucket_of(f"{url}{third[0]}") as (system, path):  # half of one that was cut off
        system.pipe_file(path, b"half")
    assert put_table(6, 7) == third
    assert seen == 4 * [(1, 2), (2, 2)]


def test_embedded_vectors_go_into_a_bucket(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are those of a table on the disk; a manifest of somebody else stays."""
    code, run, said = run_tiny(tmp_path / "runs", *CLOSED_FORMS, "stages=profiles")
    assert code == 0, said
    embed = ["embed", str(run), "--events", str(run / "stages" / "events"), "--output"]
    assert main([*embed, str(tmp_path / "today.parquet")]) == 0
    assert main([*embed, f"{bucket}/today/"]) == 0
    assert f"  {bucket}/today/" in capsys.readouterr().out
    found = objects_in(f"{bucket}/today")
    manifest = json.loads(found.pop(MANIFEST_FILE))
    assert [*found.values()] == [(tmp_path / "today.parquet").read_bytes()]
    assert manifest["profile"] == json.loads((tmp_path / "today.json").read_text())
    with bucket_of(f"{bucket}/today/{MANIFEST_FILE}") as (system, path):
        system.pipe_file(path, b"[]")
    assert main([*embed, f"{bucket}/today"]) == 2
    assert "manifest.json: it must be one of profiles" in capsys.readouterr().err


def test_folders_of_others_are_left_alone(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("ours")
    put(tmp_path, f"{bucket}/other")
    code, *_ = run_tiny(tmp_path / "runs", "data=synthetic", f"publish={bucket}/other", "stages=profiles")
    assert code == 2 and objects_in(f"{bucket}/other") == {"notes.txt": b"ours"}
    assert not (tmp_path / "runs" / "cache" / "events").exists(), "it is said before the work"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("root=s3://shop/runs", "run: root must be a path of a file system, got 's3://shop/runs'"),
        ("cache=s3://shop/cache", "run: cache must be a path of a file system"),
        ("publish=/tmp/profiles", "run: publish must be an address such as s3://bucket/profiles, got '/tmp/profiles'"),
    ],
)
def test_where_buckets_cannot_be_is_said(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(composed("data=synthetic", override))
