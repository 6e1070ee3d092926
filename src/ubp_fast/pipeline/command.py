"""Hydra's two ways in: the command `python -m ubp_fast.run`, and `run` for Python; settings as people type them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ubp_fast.events.schema import UserError
from ubp_fast.events.sources.inspect import quoted
from ubp_fast.files import flatten
from ubp_fast.pipeline.execute import USER_ERROR, execute, explained, run_stages
from ubp_fast.pipeline.run_directory import config_of
from ubp_fast.pipeline.settings import Settings, read_settings

CONF = str(Path(__file__).resolve().parent.parent / "conf")
NEAREST = 3
_SETTING = re.compile(r"(\+{0,2}[\w.@/]+)=(.*)", re.DOTALL)


@hydra.main(version_base="1.3", config_path=CONF, config_name="run")
def main(config: DictConfig) -> None:
    """Runs the stages that `config` asks for; exits with 2 and one clear line when the input is at fault."""
    sys.exit(execute(config))


def main_as_typed() -> int:
    """Runs the settings of the command line as people type them; the exit code.

    `--log` is a line a minute, `--log=json` a JSON object a line. Hydra's own options, such as `--help` and `--cfg`, go
    to Hydra.
    """
    try:
        given = as_typed(map(_progress, sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    if any(argument.startswith("-") for argument in given):
        sys.argv[1:] = given
        main()
        return 0
    return explained(lambda: execute(composed(given)))


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


def _progress(argument: str) -> str:
    """`--log` and `--log=json` as the setting that they stand for."""
    if argument != "--log" and not argument.startswith("--log="):
        return argument
    style = argument.partition("=")[2] or "lines"
    if style not in ("lines", "json"):
        raise UserError(f"run: --log must be lines or json, got '{style}'")
    return f"progress={style}"


def as_typed(arguments: Iterable[str]) -> list[str]:
    """The arguments with `key=value` quoted where the value does not parse, such as `data.path=day=1.csv`."""
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


def composed(settings: Sequence[str]) -> DictConfig:
    """The configuration of a run with these settings, `name=value` each.

    Raises:
        UserError: a setting that does not exist, with the nearest ones that do, or that cannot be read.
    """
    GlobalHydra.instance().clear()  # Hydra keeps one configuration per process
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        try:
            config = hydra.compose("run", overrides=list(settings))
        except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
            raise UserError(f"run: {_reason(settings, error)}") from error
        try:
            _require_groups(config, _chosen(settings))
        except OmegaConfBaseException as error:
            raise UserError(f"run: {_reason(settings, error)}") from error
    return config


def plain(settings: Sequence[str]) -> dict[str, Any]:
    """The same as plain data, where one value may still refer to another."""
    config: Any = OmegaConf.to_container(composed(settings), resolve=False)
    return config


def settings_of(run: Path) -> Settings:
    """The settings of an earlier run.

    Raises:
        UserError: there is none.
    """
    return read_settings(DictConfig(config_of(run)))


def groups() -> dict[str, list[str]]:
    """Every group that can be chosen -> its choices."""
    names = {"data": "data", "experiment": "experiment", "features": "features", "profile": "profile"}
    names |= {"compute": "compute", "evaluation": "evaluation"}
    names |= {f"model@{name}": "model" for name in ("contrastive", "multitask", "stacking")}
    names |= {f"optimizer@{name}.optimizer": "optimizer" for name in ("contrastive", "multitask", "stacking")}
    return {name: sorted(path.stem for path in (Path(CONF) / group).glob("*.yaml")) for name, group in names.items()}


def _reason(settings: Sequence[str], error: Exception) -> str:
    """What is wrong with settings that Hydra refuses."""
    known_groups, known = groups(), _known(settings)
    for setting in settings:
        name, is_setting, value = setting.partition("=")
        if not is_setting or name.startswith("-"):
            return f"settings must have the form name=value, got '{setting}'"
        if name in known_groups and value not in known_groups[name]:
            return f"{name} must be one of {', '.join(known_groups[name])}, got '{value}'"
        plain = name.lstrip("+~")
        if plain not in known and not name.startswith("+"):
            return f"there is no setting '{plain}'{_of_another_source(plain) or _nearest(plain, known)}"
    return " ".join(str(error).split("\nSee ")[0].split())


def _chosen(settings: Sequence[str]) -> DictConfig:
    """The configuration of the groups that were chosen, all else as they have it."""
    known = groups()
    choices = [setting for setting in settings if setting.partition("=")[0] in known]
    try:
        return hydra.compose("run", overrides=choices)
    except (HydraException, OmegaConfBaseException, TypeError, ValueError):
        return hydra.compose("run")


def _known(settings: Sequence[str]) -> list[str]:
    """Names of all settings and groups, of the groups that were chosen where these can be read."""
    leaves = flatten(OmegaConf.to_container(_chosen(settings), resolve=False))  # type: ignore[arg-type]
    parents = {name.rsplit(".", depth)[0] for name in leaves for depth in range(1, name.count(".") + 1)}
    return sorted({*groups(), *leaves, *parents})


def _require_groups(config: DictConfig, base: DictConfig, path: str = "") -> None:
    """Refuses a value in the place of a group of settings."""
    for name in map(str, base):
        if OmegaConf.is_missing(base, name) or not isinstance(base.get(name), DictConfig):
            continue
        own = config.get(name)
        if not isinstance(own, DictConfig):
            shown = ", ".join(str(key) for key in base[name] if key != "_target_")
            raise UserError(f"run: {path}{name} is a group of settings ({shown}), got {own!r}")
        _require_groups(own, base[name], f"{path}{name}.")


def _of_another_source(name: str) -> str:
    """Which sources of events have a setting that the chosen one lacks."""
    group, _, key = name.partition(".")
    if group != "data":
        return ""
    files = {path.stem: OmegaConf.load(path) for path in sorted((Path(CONF) / "data").glob("*.yaml"))}
    having = [str(source) for source, settings in files.items() if key in map(str, settings)]
    return f" of this source, but of {' and '.join(f'data={one}' for one in having)}" if having else ""


def _nearest(name: str, known: Sequence[str]) -> str:
    """What a wrong name may have meant, as the end of a sentence; settings that end alike come first."""
    last = name.rsplit(".", 1)[-1]
    found = [other for other in known if other.rsplit(".", 1)[-1] == last]
    found += get_close_matches(name, known, NEAREST)
    found += [other for other in known if get_close_matches(last, [other.rsplit(".", 1)[-1]], 1, 0.8)]
    names = list(dict.fromkeys(found))[:NEAREST]
    return f", did you mean {' or '.join(names)}?" if names else "; ubp-fast settings shows them all"
