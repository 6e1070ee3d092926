from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from ubp_fast.evaluation import EvaluationConfig, LabelScores, Metrics, Sample, Scores, TaskScore
from ubp_fast.evaluation.leaderboard import compare, leaderboard, main
from ubp_fast.files import write_json

NAN = math.nan


def task(*orders: list[float]) -> TaskScore:
    return TaskScore(tuple(tuple(Metrics(value, None, None) for value in epochs) for epochs in orders))


def scores(digests: tuple[str, ...] = ("a",), precision: str = "fp32", **tasks: TaskScore) -> Scores:
    config = EvaluationConfig(tasks=tuple(tasks), orders=len(digests), precision=precision)
    return Scores(tasks, config, digests, 10)


def test_differences_are_paired_by_order():
    first = scores(("a", "b"), churn=task([0.7], [0.5]))
    second = scores(("a", "b"), churn=task([0.6], [0.42]), conversion=task([0.5], [0.5]))
    (difference,) = compare(first, second).values()
    assert difference.per_order == pytest.approx((0.1, 0.08))
    assert difference.mean == pytest.approx(0.09)
    assert difference.standard_error == pytest.approx(0.01)
    missing = compare(scores(("a", "b"), churn=task([0.7], [NAN])), second)["churn"]
    assert (missing.mean, missing.standard_error) == (None, None)


def test_scores_that_are_not_paired_are_refused():
    first = scores(("a", "b"), churn=task([0.7], [0.5]))
    with pytest.raises(ValueError, match="same row orders, got 2 orders of 10 clients and 2 of 10"):
        compare(first, scores(("a", "c"), churn=task([0.7], [0.5])))
    with pytest.raises(ValueError, match="same precision, got fp32 and bf16"):
        compare(first, scores(("a", "b"), "bf16", churn=task([0.7], [0.5])))
    with pytest.raises(ValueError, match="must share a task"):
        compare(first, scores(("a", "b"), conversion=task([0.7], [0.5])))


def test_borda_count():
    board = leaderboard(
        {
            "first": scores(churn=task([0.7]), conversion=task([0.6])),
            "second": scores(churn=task([0.7]), conversion=task([0.8])),
            "third": scores(churn=task([0.9]), conversion=task([NAN])),
        }
    )
    assert [(place.name, place.borda) for place in board] == [("second", 3), ("first", 2), ("third", 2)]
    assert board[0].ranks == {"churn": 2, "conversion": 1}
    assert board[2].ranks == {"churn": 1, "conversion": 3}


def test_leaderboard_needs_equal_tasks():
    with pytest.raises(ValueError, match="must not be empty"):
        leaderboard({})
    with pytest.raises(ValueError, match="must have the same tasks"):
        leaderboard({"a": scores(churn=task([0.7])), "b": scores(conversion=task([0.7]))})


def read_by_trees(*samples: Sample) -> Scores:
    others = {"boosting": {"propensity_sku": LabelScores(samples, 4, 0)}}
    config = EvaluationConfig(tasks=("propensity_sku",), readers=("boosting",), orders=len(samples))
    return Scores({}, config, ("a",) * len(samples), 10, {}, others)


def test_other_readers_are_paired_by_sample_of_labels(tmp_path: Path, capsys) -> None:
    first = read_by_trees(Sample((0, 2), (0.8, 0.6)), Sample((1, 3), (0.7, 0.9)))
    second = read_by_trees(Sample((0, 2), (0.7, 0.5)), Sample((1, 3), (0.7, 0.8)))
    (difference,) = compare(first, second, "boosting").values()
    assert difference.per_order == pytest.approx((0.1, 0.05))
    assert difference.standard_error == pytest.approx(0.025)
    assert [place.name for place in leaderboard({"b": second, "a": first}, "boosting")] == ["a", "b"]
    with pytest.raises(ValueError, match="same labels and clients, got other ones in propensity_sku by 'boosting'"):
        compare(first, read_by_trees(Sample((0, 1), (0.7, 0.5)), Sample((1, 3), (0.7, 0.8))), "boosting")
    with pytest.raises(ValueError, match=r"score all with the same evaluation\.tasks and with reader 'linear'"):
        leaderboard({"b": second, "a": first}, "linear")
    run = write_run(tmp_path / "run", first=first, second=second)
    assert main([run, "--reader", "boosting"]) == 0
    assert "-0.0750±0.0250" in capsys.readouterr().out


def write_run(directory: Path, **submissions: Scores) -> str:
    directory.mkdir()
    stored = {name: scores.to_json() for name, scores in submissions.items()}
    write_json(directory / "scores.json", {**stored, "warnings": ["the history is short"]})
    return str(directory)


def test_command_ranks_the_profiles_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(
        Path("one"),
        stacked=scores(("a", "b"), churn=task([0.7], [0.5])),
        raw=scores(("a", "b"), churn=task([0.4], [0.3])),
    )
    write_run(Path("two"), stacked=scores(("c",), churn=task([0.5])))
    assert main(["one", "two/scores.json"]) == 0
    rows = [line[1:-1].split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["one stacked", "2", "0.6000 (1)"],
        ["two/scores.json stacked", "1", "0.5000 (2)"],  # scored in another row order: no difference
        ["one raw", "0", "0.3500 (3)"],
        ["", "", "-0.2500±0.0500"],
    ]


def test_command_says_what_cannot_be_compared(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "ubp_fast.evaluation.leaderboard"]
    one = write_run(tmp_path / "one", stacked=scores(churn=task([0.7])))
    other = write_run(tmp_path / "other", stacked=scores(conversion=task([0.7])))
    (tmp_path / "text").write_text("{}x")
    (tmp_path / "off").mkdir()
    for arguments, message in (
        ([one, other], "submissions must have the same tasks"),
        ([str(tmp_path / "none")], "scores.json, got 'No such file or directory'; check the path"),
        ([str(tmp_path / "off")], "off: must be a run that was scored, or its scores.json, got no scores.json in it;"),
        ([str(tmp_path / "text")], "text: file must hold the scores of a run, got 'Extra data"),
    ):
        answer = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert answer.returncode == 2
        assert answer.stderr.startswith("error: ") and message in answer.stderr
        assert answer.stderr.count("\n") == 1
