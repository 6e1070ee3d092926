"""Profiles in a bucket: Parquet parts, and a manifest that says which of them are the profiles.

    <url>/manifest.json                  the number of clients, the blocks of the vectors, and every part with its rows,
                                         bytes and digest
    <url>/part-00000-<digest>.parquet    `client_id` and `profile`, as in profiles.parquet

A store of objects renames nothing. So a part is named by what it holds, the manifest is put when all parts are there,
and it alone says what counts: whoever reads it sees the old profiles or the new ones, never some of each. Parts of the
manifest before stay until the next one, for readers that have begun. What is there already is not sent again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import polars as pl

from ubp_fast.events.read import parquet_files
from ubp_fast.files import ObjectError, bucket_of, file_digest, load_json
from ubp_fast.progress import Progress

MANIFEST_FILE, FORMAT = "manifest.json", 1
_PART = re.compile(r"part-\d{5}-[0-9a-f]{16}\.parquet")


def publish(table: Path, layout: Path, url: str, progress: Progress) -> dict[str, Any]:
    """Puts profiles into a bucket; called again after an error it goes on.

    Args:
        table: profiles.parquet, a file or a directory of parts.
        layout: profile.json, what the columns are.
        url: of a folder that is new or holds profiles, such as s3://bucket/profiles.
        progress: called with (parts done, parts in all).

    Returns:
        The content of the manifest.

    Raises:
        ObjectError: the store says no, or the folder holds something else.
    """
    url, parts = url.rstrip("/"), dict[str, tuple[Path, dict[str, Any]]]()
    for number, file in enumerate(parquet_files(table)):
        facts = {"rows": _rows(file), "bytes": file.stat().st_size, "blake2b": file_digest(file)}
        parts[f"part-{number:05d}-{facts['blake2b']}.parquet"] = (file, facts)
    manifest = {
        "format": FORMAT,
        "clients": sum(facts["rows"] for _, facts in parts.values()),
        "profile": load_json(layout),
        "parts": [{"name": name, **facts} for name, (_, facts) in parts.items()],
    }
    there = objects_there(url)
    before = _named_before(url) if MANIFEST_FILE in there else set()
    for done, (name, (file, facts)) in enumerate(parts.items()):
        if there.get(name) != facts["bytes"]:
            with bucket_of(f"{url}/{name}") as (system, path):
                system.put_file(str(file), path)
        progress(done + 1, len(parts))
    with bucket_of(f"{url}/{MANIFEST_FILE}") as (system, path):
        system.pipe_file(path, json.dumps(manifest, indent=1, allow_nan=False).encode())
    for name in there.keys() - {MANIFEST_FILE, *parts, *before}:
        with bucket_of(f"{url}/{name}") as (system, path):
            system.rm_file(path)
    return manifest


def objects_there(url: str) -> dict[str, int]:
    """Name -> bytes of what an earlier call has put into a folder.

    Raises:
        ObjectError: the store says no, or the folder holds something else.
    """
    with bucket_of(url) as (system, path):
        system.invalidate_cache()
        found = system.find(path, detail=True)
        there = {name[len(path.rstrip("/")) + 1 :]: one["size"] for name, one in found.items()}
    others = [name for name in there if name != MANIFEST_FILE and not _PART.fullmatch(name)]
    if others:
        raise ObjectError(f"{url}: the folder must be new or hold profiles, got '{others[0]}' in it; name another one")
    return there


def _named_before(url: str) -> set[str]:
    """Names of the parts of the profiles that are there."""
    with bucket_of(f"{url}/{MANIFEST_FILE}") as (system, path):
        content = system.cat_file(path)
    try:
        return {part["name"] for part in json.loads(content)["parts"]}
    except (ValueError, LookupError, TypeError) as error:
        raise ObjectError(
            f"{url}/{MANIFEST_FILE}: it must be one of profiles, got another content ({error}); remove it or name"
            " another folder"
        ) from error


def _rows(file: Path) -> int:
    return int(pl.scan_parquet(file).select(pl.len()).collect().item())
