"""The command line: every command does what its Python twin does, and tells of mistakes in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.runs import TINY

from ubp_fast.cli import main
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import UserError
from ubp_fast.events.split import DAY_S, utc_text
from ubp_fast.profiles import Profiles

SHOP = ("data=synthetic", "data.clients=200", "data.skus=60", "data.urls=80")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    code = main(
        ["run", *TINY, *SHOP, f"root={root}", f"directory={root / 'shop'}", "evaluation=off", "profiles.at=end"]
    )
    assert code == 0
    return root / "shop"


def test_embed_gives_the_vectors_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = ["--events", str(run / "stages" / "events")]
    assert main(["embed", str(run), *events, "--output", str(tmp_path / "today")]) == 0
    assert "profiles of 200 clients" in capsys.readouterr().out
    wanted = Profiles.load(run / "latest")
    assert np.array_equal(Profiles.load(tmp_path / "today").embeddings, wanted.embeddings)
    (tmp_path / "clients.txt").write_text("".join(f"{client}\n" for client in wanted.client_ids[[7, 3]]))
    more = ["--clients", str(tmp_path / "clients.txt"), "--blocks", "strong", "--column-per-block"]
    assert main(["embed", str(run), *events, *more, "--output", str(tmp_path / "two.parquet")]) == 0
    assert "note" not in capsys.readouterr().out
    table = pl.read_parquet(tmp_path / "two.parquet")
    assert table.columns == ["client_id", "strong"]
    assert table["client_id"].to_list() == wanted.client_ids[[7, 3]].tolist()
    assert np.array_equal(pl.read_parquet(run / "latest.parquet")["client_id"].to_numpy(), wanted.client_ids)


Told = Callable[..., list[str]]


@pytest.fixture(params=["lines", "json"])
def told(request: pytest.FixtureRequest, run: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    """The notes that `embed` prints with some options."""

    def notes(*options: str, run: Path = run) -> list[str]:
        capsys.readouterr()
        assert main(["embed", str(run), *options, f"--log={request.param}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        if request.param == "json":
            return [line["text"] for line in map(json.loads, lines) if line["event"] == "note"]
        return [line.removeprefix("note  ") for line in lines if line.startswith("note")]

    return notes


def test_clients_who_did_nothing_are_told(told: Told, run: Path, tmp_path: Path) -> None:
    """An id that is written otherwise, or a moment before the log, gives vectors, too: of somebody without events."""
    told = partial(told, "--events", str(run / "stages" / "events"), "--output", str(tmp_path / "out.parquet"))
    (tmp_path / "clients.txt").write_text(f"{Profiles.load(run / 'latest').client_ids[0]}\n987654321\n")
    (one,) = told("--clients", str(tmp_path / "clients.txt"))
    assert one.startswith("client 987654321 has no event before 2022-")
    (two,) = told("--clients", str(tmp_path / "clients.txt"), "--at", "2001-02-03")
    assert re.match(r"2 clients, \d+ first, have no event before 2001-02-03 00:00:00: ", two)


def test_a_moment_long_after_the_log_is_told(told: Told, run: Path, tmp_path: Path) -> None:
    """In a wrong year everybody looks like somebody who has left, and the vectors were written without a word."""
    events = EventDirectory.open(run / "stages" / "events")
    embed = partial(told, "--events", str(events.path), "--output", str(tmp_path / "out.parquet"))
    near, far = (utc_text(events.last_s + days * DAY_S) for days in (30, 31))
    assert embed("--at", near) == []
    (note,) = embed("--at", far)
    assert note.startswith(
        f"the moment, {far}, lies 31 days after the newest event that is known, of {utc_text(events.last_s)[:10]}: "
    )
    copy = Path(shutil.copytree(run, tmp_path / "shop"))
    day = pl.DataFrame({"client_id": [7], "timestamp": [events.last_s + DAY_S], "sku": [1001]})
    (tmp_path / "day").mkdir()
    day.write_parquet(tmp_path / "day" / "product_buy.parquet")
    append = partial(told, "--append", "--events", str(tmp_path / "day"), run=copy)
    assert append("--at", near) == []
    (note,) = append("--at", utc_text(events.last_s + 1001 * DAY_S))
    assert f"lies 1,000 days after the newest event that is known, of {utc_text(events.last_s + DAY_S)[:10]}: " in note
    one = pl.DataFrame({"client_id": [7], "timestamp": [events.last_s - 90 * DAY_S], "sku": [1001]})
    one.write_parquet(tmp_path / "day" / "product_buy.parquet")
    idle = partial(told, "--events", str(tmp_path / "day"), "--output", str(tmp_path / "out.parquet"))
    assert idle("--at", near) == [], "one client's events may end long before the shop's"


def test_log_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", *TINY, *SHOP, f"root={tmp_path}", "stages=[events]"]
    assert main([*command, "--log=json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["stage_started", "stage_finished", "run_finished"]
    assert Path(lines[-1]["directory"]).is_dir()
    assert main([*command, "--log"]) == 0, "how it is told does not make it another run"
    assert main([*command, "--log=loud"]) == 2
    assert "--log must be lines or json, got 'loud'" in capsys.readouterr().err


def test_cache_is_listed_explained_and_pruned(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = run.parent / "cache"
    assert main(["cache", "list", "--cache", str(cache)]) == 0
    assert capsys.readouterr().out.count("latest-stacking-") == 1
    assert main(["cache", "why", str(run)]) == 0
    assert "0 of 4 stages will be made" in capsys.readouterr().out
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    (record,) = (copy / "records").glob("latest-store-*.json")
    made = json.loads(record.read_text())
    made["sources"]["version of numba"] = "0.1"
    record.write_text(json.dumps(made))
    (output,) = copy.glob("latest-store-*[0-9a-f]")
    output.rename(output.with_name("latest-store-0000000000000000"))
    record.rename(record.with_name("latest-store-0000000000000000.json"))
    other = tmp_path / "shop"
    (other / "stages").mkdir(parents=True)
    (other / "stages" / "latest-store").symlink_to(output.with_name("latest-store-0000000000000000"))
    config = (run / "config.yaml").read_text().replace(f"cache: {cache}", f"cache: {copy}")
    (other / "config.yaml").write_text(config)
    assert main(["cache", "why", str(other)]) == 0
    assert "latest-store: numba is" in (explained := capsys.readouterr().out)
    assert ", was 0.1" in explained
    assert main(["cache", "prune", "--cache", str(copy)]) == 0
    assert "removed 1 of 4 outputs" in capsys.readouterr().out, (
        "what the run of the copied notes has made or begun stays"
    )
    output.with_name("latest-store-0000000000000000").mkdir()
    shutil.rmtree(copy / "users")
    assert main(["cache", "prune", "--cache", str(copy), "--older-than", "1"]) == 0
    assert "removed 0 of 4 outputs" in capsys.readouterr().out
    assert main(["cache", "prune", "--cache", str(copy)]) == 0
    assert "removed 4 of 4 outputs" in capsys.readouterr().out
    assert not list(copy.glob("[!.]*-*"))
    assert main(["cache", "list", "--cache", str(tmp_path / "none")]) == 2
    assert main(["cache", "why"]) == 2


def test_everybody_is_kept_and_days_are_appended(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "shop"))
    events, before = str(copy / "stages" / "events"), len(list((copy / "model" / "days").iterdir()))
    everybody = ["--at", "2022-11-12", "--everybody", "--output", str(tmp_path / "today")]
    assert main(["embed", str(copy), "--events", events, *everybody]) == 0
    assert len(list((copy / "model" / "days").iterdir())) == before + 1
    day = pl.DataFrame({"client_id": [7], "timestamp": [1_668_300_000], "sku": [1001]})
    (tmp_path / "day").mkdir()
    day.write_parquet(tmp_path / "day" / "product_buy.parquet")
    capsys.readouterr()
    assert main(["embed", str(copy), "--append", "--events", str(tmp_path / "day")]) == 0
    printed = capsys.readouterr().out
    assert "append done in" in printed and str(copy / "latest") in printed
    assert len(list((copy / "model" / "days").iterdir())) == before + 2


def test_validate_and_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(run / "latest")]) == 0
    assert "valid: 200 clients" in capsys.readouterr().out
    data = [*TINY, *SHOP, f"root={tmp_path}", f"directory={tmp_path / 'scores'}"]
    assert (
        main(["evaluate", str(run / "latest"), "evaluation.common_clients=true", *data, "evaluation.readers=[linear]"])
        == 0
    )
    assert (tmp_path / "scores" / "scores.json").exists()
    assert main(["leaderboard", str(tmp_path / "scores"), "--reader", "linear"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "RUN", "--events", "nothing.csv", "--output", "OUT"], "nothing.csv: table must exist"),
        (
            ["embed", "RUN", "--events", "RUN/stages/events", "--output", "OUT", "--at", "soon"],
            "at: must be a date or a date-time like",
        ),
        (["embed", "RUN", "--events", "RUN/stages/events", "--output", "OUT", "--blocks", "x"], "blocks must be among"),
        (
            ["embed", "RUN", "--events", "RUN/stages/events", "--output", "OUT", "--clients", "no.txt"],
            "no.txt: file must",
        ),
        (
            ["embed", "RUN", "--events", "RUN/stages/events", "--append", "--everybody"],
            "leave out --output, --clients, --blocks, --everybody",
        ),
        (
            ["embed", "RUN", "--events", "RUN/stages/events", "--output", "OUT", "--at", "2000-01-01", "--everybody"],
            "must have the events of all clients",
        ),
        (["validate", "RUN"], "got neither; did you mean RUN/latest?"),
        (["cache", "prune", "--cache", "RUN"], "got RUN, which holds no output of a stage; check the path"),
        (["cache", "prune", "--cache", "RUNS"], "got RUNS, which holds no output of a stage; did you mean RUNS/cache?"),
        (["leaderboard", "RUN"], "got no scores.json in it; run it without evaluation=off"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(run), "RUN/stages/events": str(run / "stages" / "events"), "OUT": str(tmp_path / "out")}
    places["RUNS"] = str(run.parent)
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.replace(str(run), "RUN").replace(str(run.parent), "RUNS") and error.startswith("error: ")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert (run / "latest").is_dir() and (run.parent / "cache").is_dir(), "nothing is pruned that is no cache's"


def begun(run: Path) -> None:
    """A run that was stopped before its model."""
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")


def with_bundle(run: Path, content: str) -> None:
    (run / "model").mkdir(parents=True)
    (run / "model" / "bundle.json").write_text(content)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("nowhere", lambda _: None, "nowhere: must be the directory of a run, got none there; check the path"),
        ("file", lambda path: path.touch(), "file: must be the directory of a run, got a file; name the directory"),
        ("empty", Path.mkdir, "got neither model/ nor bundle.json; check the path"),
        ("stopped", begun, "got one that stopped before, or whose stages have no profiles; run the"),
        (
            "old",
            lambda path: with_bundle(path, '{"format": 4}'),
            "format must be 5, got 4 of an older version of ubp_fa",
        ),
        (
            "cut",
            lambda path: with_bundle(path, '{"format": '),
            "bundle.json: file must be complete, got 'Expecting val",
        ),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["embed", "RUN", "--events", "x", "--output", "OUT"],
        ["embed", "RUN", "--events", "x", "--append"],
        ["forget", "RUN", "--clients", "IDS"],
        ["run", "profiles.align_to=RUN", "root=OUT"],
    ],
    ids=" ".join,
)
def test_a_place_without_a_model_is_told_in_a_sentence(
    command: list[str],
    name: str,
    make: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`[Errno 2] No such file or directory: 'nowhere/bundle.json'` was all that was said."""
    (tmp_path / "ids.txt").write_text("7\n")
    make(tmp_path / name)
    places = {"RUN": tmp_path / name, "OUT": tmp_path / "out", "IDS": tmp_path / "ids.txt"}
    words = []
    for word in command:
        key, is_setting, value = word.rpartition("=")
        words.append(f"{key}{is_setting}{places.get(value, value)}")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Errno" not in error and error.count("\n") == 1


def test_a_run_whose_configuration_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (":::{", "seed: [0", "- seed"):
        begun(tmp_path / "run")
        (tmp_path / "run" / "config.yaml").write_text(content)
        for command in (["cache", "why", str(tmp_path / "run")], ["run", f"directory={tmp_path / 'run'}"]):
            assert main(command) == 2
            error = capsys.readouterr().err
            assert "config.yaml: file must be as a run wrote it, got '" in error and error.count("\n") == 1
        shutil.rmtree(tmp_path / "run")


def test_what_the_user_may_not_read_is_no_mistake_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    begun(tmp_path / "run")
    (tmp_path / "run" / "scores.json").touch()
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    for command, file in (
        (["cache", "why", str(tmp_path / "run")], "config.yaml"),
        (["leaderboard", str(tmp_path / "run")], "scores.json"),
        (["inspect", str(tmp_path / "run" / "scores.json")], "scores.json"),
    ):
        assert main(command) == 2
        wanted = f"error: {tmp_path / 'run' / file}: this user must have access, got 'Permission denied'; change"
        assert capsys.readouterr().err.startswith(wanted)


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["validate", "somewhere", "--what"])
    assert stop.value.code == 2 and "unknown arguments: --what" in capsys.readouterr().err


def test_python_does_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ubp_fast

    settings = dict(setting.split("=", 1) for setting in (*TINY, *SHOP)) | {
        "evaluation": "off",
        "evaluation.tasks": ["churn"],
        "profiles.at": "end",
        "root": tmp_path / "it's here",
        "directory": None,
    }
    made = ubp_fast.run(settings, quiet=True)
    assert made.parent == tmp_path / "it's here" and capsys.readouterr().out == ""
    found = ubp_fast.Profiler.load(made).embed(made / "stages" / "events")
    assert np.array_equal(found.embeddings, ubp_fast.Profiles.load(run / "latest").embeddings)
    with pytest.raises(UserError, match=r"there is no setting 'data\.clinets', did you mean data\.clients"):
        ubp_fast.run(["data=synthetic", "data.clinets=5"])
    with pytest.raises(UserError, match="got the text"):
        ubp_fast.run("data=synthetic")
    with pytest.raises(AttributeError, match="no attribute 'profiler_'"):
        _ = ubp_fast.profiler_


def test_inspect_says_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "orders.csv"
    file.write_text("customer;bought at;article\n7;2024-01-31 10:00;3\n8;2024-02-01 11:00;4\n")
    assert main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "data.client_column=customer" in printed and "bought at" in printed
    assert main(["inspect", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_letters_that_a_terminal_does_not_have_are_spelled(tmp_path: Path) -> None:
    (tmp_path / "käufe.csv").write_text("customer;bought at;artikelgröße\n7;2024-01-31 10:00;3\n8;2024-02-01 11:00;4\n")
    text = "import sys; from ubp_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", text, "inspect", str(tmp_path / "käufe.csv")]
    for encoding, letter in (("ascii", b"\\xe4"), ("latin-1", b"\xe4"), ("utf-8", "ä".encode())):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        answer = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert answer.returncode == 0 and b"k" + letter + b"ufe.csv" in answer.stdout


def test_a_reader_that_has_gone_is_no_mistake_of_ours() -> None:
    """As in `ubp-fast doctor | head -1`: the code of a shell's commands, and not a word."""
    text = "import sys; from ubp_fast.cli import main; sys.exit(main(['settings']))"
    command = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None
    command.stdout.close()
    assert command.communicate(timeout=60)[1] == b"" and command.returncode == 141
