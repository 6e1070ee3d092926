"""Hydra's two ways in: the command `python -m ubp_fast.run`, and `run` for Python; settings as people type them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ubp_fast.events.schema import UserError
from ubp_fast.events.sources.inspect import quoted
from ubp_fast.pipeline.execute import execute, run_stages
from ubp_fast.pipeline.settings import read_settings

_SETTING = re.compile(r"(\+{0,2}[\w.@/]+)=(.*)", re.DOTALL)
CONF = str(Path(__file__).resolve().parent.parent / "conf")


@hydra.main(version_base="1.3", config_path=CONF, config_name="run")
def main(config: DictConfig) -> None:
    """Runs the stages that `config` asks for; exits with 2 and one clear line when the input is at fault."""
    sys.exit(execute(config))


def main_as_typed() -> None:
    """`main`, with settings as people type them."""
    sys.argv[1:] = as_typed(sys.argv[1:])
    main()


def as_typed(arguments: Sequence[str]) -> list[str]:
    """The arguments with `key=value` quoted where the value does not parse, such as `data.path=day=1.csv`.

    A value that the configuration's grammar would take apart is a plain text.
    """
    parser = OverridesParser.create()
    return [_as_typed(parser, argument) for argument in arguments]


def _as_typed(parser: OverridesParser, argument: str) -> str:
    found = _SETTING.fullmatch(argument)
    if found is None:
        return argument
    try:
        if not parser.parse_override(argument).is_sweep_override():
            return argument
    except HydraException:
        pass
    return f"{found[1]}={quoted(found[2])}"


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
    try:
        GlobalHydra.instance().clear()  # Hydra keeps one configuration per process
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            config = hydra.compose("run", overrides=list(settings))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"run: {str(error).strip().splitlines()[0]}") from error
    return run_stages(read_settings(config), Console(quiet=quiet))


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
