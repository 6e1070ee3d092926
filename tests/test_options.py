"""Settings are described where they are declared, and shells complete them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ubp_fast.cli import COMMANDS, main, parser
from ubp_fast.files import flatten
from ubp_fast.options import markdown, options
from ubp_fast.pipeline.command import plain
from ubp_fast.pipeline.settings import Report

ROOT = Path(__file__).resolve().parent.parent


def test_every_setting_is_described() -> None:
    found = [one for group in options().values() for one in group]
    assert [one.name for one in found if not one.text or not one.kind] == []
    known = flatten(plain(["data=synthetic", "~experiment"]))
    assert len(known) > 150
    named = tuple(one.name for one in found)  # a list of parts is one setting
    assert [name for name in known if not name.startswith(named) and not name.endswith(("_target_", "_partial_"))] == []


def test_descriptions_come_from_docstrings_comments_and_files() -> None:
    found = {one.name: one for group in options().values() for one in group}
    assert found["report.show_ids"].default == str(Report.show_ids).lower()
    assert found["data.path"].default == "needed" and "a pattern" in found["data.path"].text
    assert found["contrastive.config.history_length"].text == "last events before the cutoff"
    assert found["contrastive.config.negatives"].kind == "one of cross, symmetric"
    assert found["windows.labels"].text.startswith("values per label list")
    assert "docs/" not in "".join(one.text for one in found.values()), "where a constant comes from is not for users"


def test_the_page_is_what_the_command_writes() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert text == markdown(), "ubp-fast settings --markdown > docs/settings.md"


def test_settings_are_found_by_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "data=sql", "uri"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "=" in line] == [
        "data=sql",
        "  data.uri=needed  (a text)",
    ]
    assert main(["settings", "no-such"]) == 2
    assert "got none that does" in capsys.readouterr().err


def test_every_command_stands_in_a_group() -> None:
    grouped = [name for _, commands in COMMANDS.values() for name in commands]
    subparsers = parser()._subparsers
    assert subparsers is not None
    assert sorted(subparsers._group_actions[0].choices) == sorted(grouped)  # type: ignore[arg-type]
    text = parser().format_help()
    assert all(f"\n  {name} " in text for name in grouped)


def test_help_of_run_names_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "complete_journey, sql, synthetic, table" in printed and "best, demo, winner" in printed


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ubp-fast ru", ["run"]),
        ("ubp-fast embed --ev", ["--events", "--everybody"]),
        ("ubp-fast run data=sy", ["synthetic"]),
        ("ubp-fast run report.a", ["report.against="]),
        ("ubp-fast cache wh", ["why"]),
        ("ubp-fast inspect even", ["events.csv"]),
    ],
)
def test_bash_completes(typed: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out)
    (tmp_path / "events.csv").touch()
    script = (
        'source ./completion.sh; COMP_LINE="$1"; COMP_POINT=${#1}; read -ra COMP_WORDS <<< "$1";'
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _ubp_fast 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        [bash, "--norc", "-c", script, "bash", typed], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert "data=synthetic" in printed and "--everybody" in printed
    assert printed.startswith({"zsh": "autoload -U +X bashcompinit", "fish": "complete -c ubp-fast"}[shell])
