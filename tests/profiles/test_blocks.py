"""Blocks of a profile: their scales, what is left out, what float16 keeps of faint ones, files, selection, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.features import scaling
from ubp_fast.profiles import Layout, Profiles
from ubp_fast.profiles.blocks import LayoutConfig, Part, compose

CLIENTS = 500


def parts(own_columns: int = 6) -> list[Part]:
    random = np.random.default_rng(0)
    strong = np.c_[random.normal(size=CLIENTS), np.ones(CLIENTS)].astype(np.float32)
    own = random.poisson(0.3, (CLIENTS, own_columns)).astype(np.float32) + 100
    own[:, 1] = 7
    importance = np.arange(own_columns, dtype=np.float64)[::-1] % 4
    return [
        Part("strong", strong, ["first", "one"], None, "what matters", "decayed"),
        Part("graded", random.normal(3, 5, (CLIENTS, 2)), ["a", "b"], (0.5, 0.25), "the same, graded", "everything"),
        Part("own", own, [f"own_{n}" for n in range(own_columns)], 1e-4, "the features", "everything", importance),
        Part("rhythm", random.normal(size=(CLIENTS, 1)), ["hours"], 0.01, "when", "times"),
    ]


def profiles(max_width: int = 2048) -> Profiles:
    vectors, layout = compose(parts(), max_width)
    return Profiles(np.arange(CLIENTS), vectors, layout)


def test_every_block_has_its_own_scale() -> None:
    made = profiles()
    given = {part.name: part.values for part in parts()}
    np.testing.assert_array_equal(made.select("strong").embeddings, given["strong"].astype(np.float16))  # type: ignore[attr-defined]
    graded = made.select("graded").embeddings.astype(np.float64)
    np.testing.assert_allclose(graded.std(axis=0), [0.5, 0.25], rtol=1e-3)
    np.testing.assert_allclose(graded.mean(axis=0), 0, atol=1e-3)
    own = made.select("own").embeddings.astype(np.float64)
    np.testing.assert_allclose(np.delete(own, 1, axis=1).std(axis=0), 1e-4, rtol=1e-2)
    assert not own[:, 1].any(), "a constant says nothing"


def test_faint_columns_lose_nothing() -> None:
    """Trees and regressions that bring columns to one scale must find what they would find in the features."""
    random = np.random.default_rng(1)
    rare = np.where(random.random(20_000) < 0.001, random.lognormal(size=20_000), 0.0)
    days = random.uniform(0, 365, 20_000)
    values = np.stack((rare, days), axis=1)
    vectors, _ = compose([Part("own", values, ["rare", "days"], 1e-4, "", "")])
    back = vectors.astype(np.float64)
    for column in range(2):
        assert np.corrcoef(back[:, column], values[:, column])[0, 1] > 1 - 1e-6
    assert len(np.unique(back[rare > 0, 0])) > 0.9 * len(np.unique(rare[rare > 0])), "eleven bits of every rare value"
    assert (back[rare > 0, 0].min() > back[rare == 0, 0]).all(), "something is more than nothing"


def test_features_that_say_least_are_left_out_and_named() -> None:
    made = profiles(max_width=2 + 2 + 4 + 1)
    assert made.dim == 9
    own = next(block for block in made.layout.blocks if block.name == "own")  # type: ignore[union-attr]
    # importance 1 0 3 2 1 0
    assert own.columns == ("own_0", "own_2", "own_3", "own_4")
    assert own.left_out == ("own_1", "own_5")
    whole = profiles()
    columns = whole.layout.columns_of("own")[[0, 2, 3, 4]]  # type: ignore[union-attr]
    np.testing.assert_array_equal(made.select("own").embeddings, whole.embeddings[:, columns])
    with pytest.raises(UserError, match="max_width must be >= 5, the columns that cannot be left out, got 4"):
        profiles(max_width=4)


def test_rows_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = profiles().embeddings
    monkeypatch.setattr(scaling, "ROWS_AT_ONCE", 77)
    monkeypatch.setattr("ubp_fast.profiles.blocks.ROWS_AT_ONCE", 77)
    np.testing.assert_allclose(profiles().embeddings, whole, rtol=1e-3, atol=1e-7)


def test_layout_is_written_beside_the_vectors(tmp_path: Path) -> None:
    made = profiles()
    made.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"client_ids.npy", "embeddings.npy", "profile.json"}
    written = json.loads((tmp_path / "profile.json").read_text())
    assert [(block["name"], block["first_column"], block["num_columns"]) for block in written["blocks"]] == [
        ("strong", 0, 2),
        ("graded", 2, 2),
        ("own", 4, 6),
        ("rhythm", 10, 1),
    ]
    assert written["width"] == made.dim and written["blocks"][2]["scale"] == 1e-4
    assert Profiles.load(tmp_path).layout == made.layout
    some = Profiles.load(tmp_path).select("rhythm", "strong")
    np.testing.assert_array_equal(some.embeddings, made.embeddings[:, [0, 1, 10]])
    some.align(some.client_ids[::-1]).to_float16().save(tmp_path)
    again = Profiles.load(tmp_path)
    assert again.layout == some.layout and [block.name for block in again.layout.blocks] == ["strong", "rhythm"]  # type: ignore[union-attr]
    Profiles(made.client_ids, made.embeddings).save(tmp_path)
    assert Profiles.load(tmp_path).layout is None, "a description of other vectors must not stay"


def test_last_digits_of_a_scale_change_nothing() -> None:
    """A sum over clients ends in other digits for another number of threads."""
    noisy = [
        part._replace(scale=tuple(value * (1 + 1e-14) for value in part.scale)) if part.name == "graded" else part
        for part in parts()
    ]
    (vectors, layout), (others, same) = compose(parts()), compose(noisy)
    assert layout.to_json() == same.to_json() and np.array_equal(vectors, others)


def test_unknown_blocks_are_refused() -> None:
    made = profiles()
    with pytest.raises(UserError, match=r"blocks must be among \['strong', .*\], got \['taste'\]"):
        made.select("taste")
    with pytest.raises(UserError, match=r"got \[\]"):
        made.select()
    with pytest.raises(UserError, match=r"profile\.json must be there"):
        Profiles(made.client_ids, made.embeddings).select("strong")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made = profiles()
    made.save(tmp_path)
    np.save(tmp_path / "embeddings.npy", made.embeddings[:, :-1])
    with pytest.raises(DataError, match="must have the 11 columns of the layout, got 10"):
        Profiles.load(tmp_path)
    made.save(tmp_path)
    for text, message in (
        ('{"format": 7}', r"profile\.json: format must be 1, got 7"),
        ('{"format": 1}', r"profile\.json: blocks must be"),
        ("[]", r"profile\.json: format must be 1, got list"),
        ("{", r"profile\.json"),
    ):
        (tmp_path / "profile.json").write_text(text)
        with pytest.raises(DataError, match=message):
            Profiles.load(tmp_path)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="equal rows and a name per column"):
        compose([Part("own", np.ones((3, 2)), ["a"], 1.0, "", "")])
    values = np.ones((9, 2), np.float32)
    values[4, 1] = 1e6
    with pytest.raises(DataError, match="'b' of block 'strong' must be finite and fit float16, got inf in row 4"):
        compose([Part("strong", values, ["a", "b"], None, "", "")])
    with pytest.raises(ValueError, match="different names"):
        Layout(profiles().layout.blocks * 2)  # type: ignore[union-attr]


def test_bad_constants_are_refused() -> None:
    with pytest.raises(UserError, match="own must be >= 0, got -1"):
        LayoutConfig(own=-1.0)
    with pytest.raises(UserError, match="directions must be >= 1, got 0"):
        LayoutConfig(directions=0)
    with pytest.raises(UserError, match="max_width must be <= 2048, got 4096"):
        LayoutConfig(max_width=4096)
