"""Forgotten clients: nothing of a run holds their ids, the others keep their bytes, and days can be appended."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.runs import run_tiny

from ubp_fast.cli import main
from ubp_fast.events.schema import UserError
from ubp_fast.profiler import Profiler, forget
from ubp_fast.profiles import Profiles

START_S, DAYS, CLIENTS = 1_704_067_200, 100, 40
GONE = [f"customer-{number}" for number in (3, 17, 31)]


def events(first_day: int = 0, days: int = DAYS) -> pl.DataFrame:
    random = np.random.default_rng(first_day)
    day, client = (random.random((days, CLIENTS)) < (np.arange(CLIENTS) + 5) / 60).nonzero()
    return pl.DataFrame(
        {
            "customer": [f"customer-{number}" for number in client],
            "timestamp": START_S + (first_day + day) * 86_400 + client,
            "sku": random.integers(0, 8, len(day)),
            "pieces": random.integers(1, 6, len(day)),
            "price": random.random(len(day)) * 20,
        }
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forget")
    events().write_parquet(root / "events.parquet")
    data = ("data=table", f"data.path={root / 'events.parquet'}", "data.client_column=customer")
    amounts = ("data.price_column=price", "data.quantity_column=pieces")
    code, run, printed = run_tiny(root / "runs", *data, *amounts, "evaluation.readers=[linear]", "profiles.at=end")
    assert code == 0, printed
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run and its cache, which a test may change."""
    return Path(shutil.copytree(made.parent, tmp_path / "runs", symlinks=True)) / made.name


def holders(directory: Path) -> list[str]:
    """Files, those of linked folders too, in which an id stands, as text or in a column."""
    found = []
    for file in directory.rglob("*"):
        if not file.is_file():
            continue
        text = file.read_bytes().decode("latin-1")
        if file.suffix == ".parquet":
            text += str(pl.read_parquet(file).select(pl.col(pl.String)).to_dict(as_series=False))
        if any(f"{name}'" in text or f"{name}\n" in text for name in GONE):
            found.append(str(file))
    return found


def test_nothing_holds_their_ids_and_the_others_keep_their_bytes(run: Path, tmp_path: Path) -> None:
    assert holders(run) and holders(run.parent / "cache")
    before = {name: Profiles.load(run / name) for name in ("profiles", "latest")}
    numbers = dict(pl.read_parquet(run / "stages" / "events" / "maps" / "client_id.parquet").iter_rows())
    gone = np.array([numbers[name] for name in GONE])
    assert (run / "report.html").exists()
    done = forget(run, GONE)
    assert not (run / "report.html").exists(), "it shows single clients"
    assert done.clients == 3 and "strong" in done.learned_from and "scores" in done.learned_from
    assert not holders(run) and not holders(run.parent / "cache")
    for name, old in before.items():
        new = Profiles.load(run / name)
        kept = ~np.isin(old.client_ids, gone)
        assert kept.sum() == len(kept) - 3
        assert np.array_equal(new.client_ids, old.client_ids[kept])
        assert new.embeddings.tobytes() == old.embeddings[kept].tobytes()
        table = pl.read_parquet(run / f"{name}.parquet")
        assert len(table) == new.num_clients and not set(GONE) & set(table["client_id"])
    for file in run.rglob("*.npy"):
        if file.stem in ("client_ids", "wanted"):
            assert not np.isin(np.load(file), gone).any()
    again = forget(run, GONE)
    assert again.clients == 0 and not again.removed


def test_days_are_appended_to_the_others(made: Path, run: Path) -> None:
    others = events(DAYS, 3).filter(~pl.col("customer").is_in(GONE))
    whole = events().vstack(others).filter(~pl.col("customer").is_in(GONE))
    forget(run, GONE)
    appended = Profiler.load(run).append(others)
    at = int(whole["timestamp"].max()) + 1  # type: ignore[call-overload]
    assert appended.embeddings.tobytes() == Profiler.load(run).embed(whole, at=at).embeddings.tobytes()
    assert len(appended.client_ids) == CLIENTS - 3


def test_stopped_and_called_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ubp_fast.profiler.forgetting._remove_stages", lambda stages: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forget(run, GONE)
    monkeypatch.undo()
    forget(run, GONE)
    assert not holders(run) and not holders(run.parent / "cache")


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join([*GONE, "customer-999"]) + "\n")
    assert main(["forget", str(run), "--clients", str(ids)]) == 0
    printed = capsys.readouterr().out
    assert "3 clients are forgotten" in printed and "run again without them" in printed
    ids.write_text("")
    assert main(["forget", str(run), "--clients", str(ids)]) == 2


def test_a_model_alone_is_no_run(run: Path) -> None:
    with pytest.raises(UserError, match="needs the directory of a run"):
        forget(run / "model", GONE)
