from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ubp_fast.files import OutputDirectoryError
from ubp_fast.pipeline.cache import (
    StageCache,
    digest,
    stage_key,
)


def test_digest_ignores_key_order_but_not_values() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_key_depends_on_name_config_and_inputs() -> None:
    key = stage_key("store", {"cutoff": 1}, {"events": "x"})
    assert key == stage_key("store", {"cutoff": 1}, {"events": "x"})
    assert key != stage_key("features", {"cutoff": 1}, {"events": "x"})
    assert key != stage_key("store", {"cutoff": 2}, {"events": "x"})
    assert key != stage_key("store", {"cutoff": 1}, {"events": "y"})


def test_output_is_made_once(tmp_path: Path) -> None:
    cache, calls = StageCache(tmp_path), []

    def make(directory: Path) -> None:
        calls.append(directory)
        (directory / "value").write_text("1")

    first = cache.build("stage", "key", make)
    assert cache.build("stage", "key", make) == first
    assert (first / "value").read_text() == "1"
    assert len(calls) == 1


def test_interrupted_output_is_invisible_and_cleared(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)

    def die(directory: Path) -> None:
        (directory / "half").write_text("x")
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / "last").write_text("state")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build("stage", "key", die, keep=("checkpoints",))
    assert not cache.has("stage", "key")

    def make(directory: Path) -> None:
        assert not (directory / "half").exists(), "what a killed run left must not mix with the new output"
        assert (directory / "checkpoints" / "last").read_text() == "state"
        (directory / "whole").write_text("y")

    output = cache.build("stage", "key", make, keep=("checkpoints",))
    assert sorted(path.name for path in output.iterdir()) == ["checkpoints", "whole"]


def test_full_disk_is_named(tmp_path: Path) -> None:
    def make(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputDirectoryError, match=r"output of stage 'store' must be .* got No space left"):
        StageCache(tmp_path).build("store", "key", make)
    assert not StageCache(tmp_path).has("store", "key")
