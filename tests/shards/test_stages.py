"""compute.shards: profiles, model and features have the bytes of one pass, whatever the number of shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.runs import CLOSED_FORMS, composed, contents, run_tiny

from ubp_fast.events.schema import UserError
from ubp_fast.features.matrix import load_features
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.pipeline.stages import plan
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.shards import first_rows


def features_of(run: Path) -> dict[str, np.ndarray]:
    """Name and cutoff of every set -> its rows, of all shards end to end."""
    folder = run / "stages" / "features"
    if (folder / "days").exists():
        parts = sorted(path.parent for path in folder.glob("f*/*/*/*/names.json"))
        found: dict[str, list[np.ndarray]] = {}
        for part in parts:
            found.setdefault(f"{part.name}-{part.parent.name}", []).append(load_features(part).rows(slice(None)))
        return {name: np.concatenate(rows) for name, rows in found.items()}
    return {path.parent.name: load_features(path.parent).rows(slice(None)) for path in folder.glob("*/names.json")}


@pytest.mark.parametrize("number", [3, 8])
def test_shards_give_the_bytes_of_one_pass(number: int, one_pass: Path, tmp_path: Path) -> None:
    code, run, said = run_tiny(tmp_path, *CLOSED_FORMS, f"compute.shards={number}")
    assert code == 0, said
    assert len(first_rows(EventStore.open(run / "stages" / "store"))) == number + 1
    wanted, found = features_of(one_pass), features_of(run)
    assert wanted.keys() == found.keys() and len(wanted) > 8
    for name, rows in wanted.items():
        np.testing.assert_array_equal(found[name], rows, err_msg=name)
    for folder in ("profiles", "model"):
        assert contents(run / folder) == contents(one_pass / folder)
    assert (run / "profiles.parquet").read_bytes() == (one_pass / "profiles.parquet").read_bytes()


def test_money_in_shards(small_parts: None, tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    table = pl.DataFrame(
        {
            "client_id": random.integers(0, 150, 3_000),
            "timestamp": 1_700_000_000 + random.integers(0, 120 * 86_400, 3_000),
            "sku": random.integers(0, 30, 3_000),
            "pieces": random.integers(1, 9, 3_000),
            "paid": random.random(3_000) * 50,
        }
    )
    table.write_parquet(tmp_path / "log.parquet")
    data = ("data=table", f"data.path={tmp_path / 'log.parquet'}", "data.quantity_column=pieces")
    others = [word for word in CLOSED_FORMS if not word.startswith("data")]
    runs = []
    for number in (1, 3):
        settings = (*others, *data, "data.spend_column=paid", f"compute.shards={number}")
        code, run, said = run_tiny(tmp_path / str(number), *settings)
        assert code == 0, said
        runs.append(run)
    layout = json.loads((runs[0] / "profiles" / "profile.json").read_text())
    names = next(block["columns"] for block in layout["blocks"] if block["name"] == "rhythm")
    assert {"spend_365d", "quantity_basket_largest", "spend_of_a_piece"} <= {*names}
    for folder in ("profiles", "model"):
        assert contents(runs[1] / folder) == contents(runs[0] / folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=best", r"networks \['contrastive', 'multitask'\]"),
        ("features=rich", "features=rich, whose propensities"),
        ("model@stacking=stacking", "the stacking network"),
        ("evaluation.components=[stacked,features]", "features as a scored component"),
        ("profiles.client_order=baseline", "profiles.client_order=baseline"),
    ],
)
def test_what_no_shard_does_is_refused(override: str, message: str) -> None:
    for sharded in ("compute.shards=2", "compute.engine=ray"):
        with pytest.raises(UserError, match=f"works with closed forms alone .*got .*{message}.*compute.shards=1"):
            plan(read_settings(composed(override, sharded)))
