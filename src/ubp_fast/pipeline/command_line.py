"""Settings as people type them: a value that the configuration's grammar would take apart is a plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ubp_fast.events.sources.inspect import quoted

_SETTING = re.compile(r"(\+{0,2}[\w.@/]+)=(.*)", re.DOTALL)


def as_typed(arguments: Sequence[str]) -> list[str]:
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
