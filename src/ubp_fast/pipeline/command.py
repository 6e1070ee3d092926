"""Hydra's two ways in: the command `python -m ubp_fast.run`, and `run` for Python."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from ubp_fast.events.schema import UserError
from ubp_fast.pipeline.command_line import CONF, as_typed, composed
from ubp_fast.pipeline.execute import USER_ERROR, execute, run_stages
from ubp_fast.pipeline.settings import read_settings


@hydra.main(version_base="1.3", config_path=CONF, config_name="run")
def main(config: DictConfig) -> None:
    """Runs the stages that `config` asks for; exits with 2 and one clear line when the input is at fault."""
    sys.exit(execute(config))


def main_as_typed() -> int:
    """Runs the settings of the command line as people type them; the exit code.

    Hydra's own options, such as `--help` and `--cfg`, go to Hydra.
    """
    given = as_typed(sys.argv[1:])
    if any(argument.startswith("-") for argument in given):
        sys.argv[1:] = given
        main()
        return 0
    try:
        config = composed(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return execute(config)


def run(settings: Mapping[str, object] | Sequence[str], quiet: bool = False) -> Path:
    """From event logs to profiles and scores, as `python -m ubp_fast.run`; what is there already is not made again.

    Args:
        settings: name -> value such as {"data": "table", "data.path": "events.parquet"}, or "name=value" texts.
        quiet: prints nothing.

    Returns:
        The directory of the run.

    Raises:
        UserError: a setting or the input breaks a rule.
        OutputDirectoryError: the run's directory belongs to another configuration, or cannot be written.
    """
    if isinstance(settings, str):
        raise UserError(f"run: settings must be a dict or a list of 'name=value', got the text '{settings}'")
    if isinstance(settings, Mapping):
        settings = [f"{name}={_written(value)}" for name, value in settings.items()]
    return run_stages(read_settings(composed(settings)), Console(quiet=quiet))


def _written(value: object) -> str:
    """A value as Hydra reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}: {_written(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    if text and all(character.isalnum() or character in "_-./@" for character in text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
