from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.shops import EMPTY_CLIENT, make_store

from ubp_fast.evaluation import EvaluationConfig, Scores
from ubp_fast.evaluation.readers import LabelScores, Sample
from ubp_fast.files import OutputDirectoryError
from ubp_fast.pipeline.run_directory import RunDirectory, _empty_clients, environment, warnings_of
from ubp_fast.store.event_store import EventStore

CONFIG = {"seed": 0, "data": {"clients": 10}, "stages": "all", "compute": {"threads": 1}}


def test_same_configuration_continues(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run", CONFIG)
    RunDirectory(tmp_path / "run", CONFIG | {"stages": ["evaluate"], "compute": {"threads": 2}})


def test_other_configuration_is_refused_by_key(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run", CONFIG)
    with pytest.raises(OutputDirectoryError, match=r"1 differing keys: data\.clients \(10 there, 20 now\)"):
        RunDirectory(tmp_path / "run", CONFIG | {"data": {"clients": 20}})
    assert "clients: 10" in (tmp_path / "run" / "config.yaml").read_text()


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputDirectoryError, match="must be empty or hold an earlier run"):
        RunDirectory(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_stage_links_follow_the_output(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", CONFIG)
    for version in ("one", "two"):
        output = tmp_path / "cache" / version
        output.mkdir(parents=True)
        (output / "value").write_text(version)
        run.link_stage("store", output)
    assert (run.path / "stages" / "store" / "value").read_text() == "two"


def test_clients_without_events_are_told(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (told,) = _empty_clients(store)
    assert told.startswith("clients: 1 of the 30 with a profile have no event before")
    wanted = np.asarray(store.is_relevant).copy()
    wanted[EMPTY_CLIENT] = False
    np.save(store.path / "is_relevant.npy", wanted)
    assert _empty_clients(EventStore.open(store.path)) == []


def test_environment_names_versions() -> None:
    facts = environment(threads=3)
    assert facts["threads"] == 3
    assert facts["packages"]["torch"]


def test_what_is_said_of_every_reader_is_said_once(tmp_path: Path) -> None:
    config = EvaluationConfig(tasks=("propensity_sku",), readers=("linear", "boosting"))

    def scores(skipped: dict[str, int]) -> Scores:
        others = {
            name: {"propensity_sku": LabelScores((Sample((0,), (0.6,)),), 9, left)} for name, left in skipped.items()
        }
        return Scores({}, config, ("a",), 10, {}, others)

    ours, baseline = scores({"linear": 2, "boosting": 2}), scores({"linear": 2, "boosting": 3})
    assert warnings_of(tmp_path, None, {"stacked": ours, "baseline": baseline}) == [  # type: ignore[arg-type]
        "propensity_sku: 2 of 9 labels have one class in the validation window, left out",
        "baseline, boosting, propensity_sku: 3 of 9 labels have one class in the validation window, left out",
    ]
