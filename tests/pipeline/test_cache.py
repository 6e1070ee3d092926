from __future__ import annotations

import errno
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from ubp_fast.events.schema import UserError
from ubp_fast.files import OutputDirectoryError
from ubp_fast.pipeline.cache import StageCache, differences, digest, made_of
from ubp_fast.pipeline.run_directory import RunDirectory


def test_digest_ignores_key_order_but_not_values() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_key_depends_on_all_that_it_is_made_of() -> None:
    base = made_of("store", {"cutoff": 1}, {"events": "x"}, {"version of numpy": "2"})
    others = [
        made_of("features", {"cutoff": 1}, {"events": "x"}, {"version of numpy": "2"}),
        made_of("store", {"cutoff": 2}, {"events": "x"}, {"version of numpy": "2"}),
        made_of("store", {"cutoff": 1}, {"events": "y"}, {"version of numpy": "2"}),
        made_of("store", {"cutoff": 1}, {"events": "x"}, {"version of numpy": "3"}),
    ]
    assert len({digest(one) for one in (base, *others)}) == 5


def test_reasons_name_what_differs() -> None:
    before = made_of(
        "a", {"x": {"y": 1}}, {"in": "1"}, {"version of numba": "0.67.0", "source of m": "s", "source of n": "t"}
    )
    now = made_of("a", {"x": {"y": 2}}, {"in": "2"}, {"version of numba": "0.68.1", "source of m": "u"})
    assert differences(before, now) == ["x.y is 2, was 1", "numba is 0.68.1, was 0.67.0", "m, n changed"]
    assert differences(before, before | {"inputs": {"in": "2"}}) == ["made from in, which changed"]
    assert differences(before, before) == []


def test_outputs_are_listed_and_pruned(tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "cache")
    run = RunDirectory(tmp_path / "run", {"seed": 1})
    first, second, third = ({"of": number} for number in range(3))
    keys = [digest(one) for one in (first, second, third)]
    for one in (first, second):
        assert cache.claim(run.path, {"a": one}) == ["a"]
    for key, size in ((keys[0], 10), (keys[1], 30)):
        cache.build("a", key, lambda folder, size=size: (folder / "x").write_bytes(bytes(size)))  # type: ignore[misc]
    assert cache.claim(run.path, {"a": first, "b": third}) == ["b"]
    run.link_stage("a", cache.path("a", keys[0]))
    begun = cache.directory / f"b-{keys[2]}.partial"
    begun.mkdir()
    shown, other, unfinished = sorted(cache.outputs(), key=lambda output: output.path.name)
    assert (unfinished.path, unfinished.runs) == (begun, shown.runs), "an interrupted run goes on from it"
    assert (shown.size, shown.runs, other.size, other.runs) == (10, ((tmp_path / "run").resolve(),), 30, ())
    assert cache.recorded((run.path / "stages" / "a").resolve()) == first
    with cache._locked(other.path), pytest.raises(UserError, match="is being made by a run"):
        cache.remove(other)
    assert cache.prune(0.0) == []
    assert cache.prune(other.used_s) == [other]
    assert not cache.has("a", keys[1])
    assert cache.recorded(other.path) is None
    assert [output.path.name for output in cache.outputs()] == [shown.path.name, begun.name]
    shutil.rmtree(run.path)
    assert [output.runs for output in cache.outputs()] == [(), ()], "nobody goes on"


def test_output_is_made_once(tmp_path: Path) -> None:
    cache, calls = StageCache(tmp_path), []

    def make(directory: Path) -> None:
        calls.append(directory)
        (directory / "value").write_text("1")

    first = cache.build("stage", "key", make)
    assert cache.build("stage", "key", make) == first
    assert (first / "value").read_text() == "1"
    assert len(calls) == 1


def test_who_needs_an_output_that_is_being_made_waits_for_it(tmp_path: Path) -> None:
    cache, begun, waiting, made = StageCache(tmp_path), Event(), Event(), []

    def make(directory: Path) -> None:
        made.append(directory)
        begun.set()
        assert waiting.wait(60)
        (directory / "value").write_text("1")

    with ThreadPoolExecutor() as pool:
        first = pool.submit(cache.build, "stage", "key", make)
        assert begun.wait(60)
        second = pool.submit(cache.build, "stage", "key", make, (), waiting.set)
        assert first.result() == second.result()
    assert len(made) == 1


def test_claimed_outputs_are_not_pruned_at_the_same_time(tmp_path: Path) -> None:
    """Whoever finds an output there keeps it: pruning sees all claims or comes before them."""
    cache = StageCache(tmp_path / "cache")
    output = cache.build("a", digest({"of": 1}), lambda folder: (folder / "x").touch())
    run = RunDirectory(tmp_path / "run", {"seed": 1})
    with ThreadPoolExecutor() as pool:
        with cache._locked(cache.directory):
            claimed = pool.submit(cache.claim, run.path, {"a": {"of": 1}})
            pruned = pool.submit(cache.prune, float("inf"))
        assert (claimed.result() == []) == (pruned.result() == []) == output.exists()


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
