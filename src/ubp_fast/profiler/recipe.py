"""The configuration that decides what a vector is, as plain data that names no code to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ubp_fast.events.schema import DataError
from ubp_fast.events.sources.table import Table
from ubp_fast.features.aggregated import AggregatedConfig
from ubp_fast.features.decayed import DecayedConfig
from ubp_fast.features.organisers import CountsConfig
from ubp_fast.features.rich import RichConfig
from ubp_fast.features.rich.item_blocks import Baskets, Conversions, Diversity, MeanCodes, Prices
from ubp_fast.features.rich.money import Money
from ubp_fast.features.rich.propensity import Propensities
from ubp_fast.features.rich.time_blocks import Activity, Calendar, Gaps
from ubp_fast.features.tastes import TastesConfig
from ubp_fast.models.contrastive import ContrastiveConfig
from ubp_fast.models.layers.encoder import EncoderConfig
from ubp_fast.models.layers.event_embedding import ConcatenatedEventConfig, ProjectedEventConfig
from ubp_fast.models.layers.ple import PLEConfig
from ubp_fast.models.multitask import MultitaskConfig
from ubp_fast.models.pair_scorer import PairScorerConfig
from ubp_fast.models.reduced_rank import ReducedRankConfig
from ubp_fast.models.stacking import StackingConfig
from ubp_fast.profiles.blocks import LayoutConfig


@dataclass(frozen=True)
class Recipe:
    """Configuration of everything between events and vectors.

    Attributes:
        aggregated, decayed, rhythm, tastes, rich: of the feature sets; no rich one when None.
        pairs: of the scorer of pairs.
        layout: scales of the profile's blocks.
        joined: what the strong columns are made of.
        stacking: of the model that makes them.
        contrastive, multitask: of the networks, trained when `joined` names them.
        table: how the columns of the shop's own table are named, where there is one.
        at_once: clients that a network takes at a time; 1: a vector has the same bytes whoever is beside it, more: to
            rounding, many times as fast.
    """

    aggregated: AggregatedConfig | CountsConfig
    decayed: DecayedConfig
    rhythm: RichConfig
    tastes: TastesConfig
    pairs: PairScorerConfig
    rich: RichConfig | None
    layout: LayoutConfig
    joined: tuple[str, ...]
    stacking: ReducedRankConfig | StackingConfig
    contrastive: ContrastiveConfig
    multitask: MultitaskConfig
    table: Table | None = None
    at_once: int = 1

    @property
    def raw_counts(self) -> bool:
        """Aggregated counts are joined as they are, not as logarithms: the winner's; docs/winner.md 5."""
        return isinstance(self.aggregated, CountsConfig)


_CLASSES = {
    one.__name__: one
    for one in (
        *(Recipe, Table, AggregatedConfig, CountsConfig, DecayedConfig, RichConfig, TastesConfig, LayoutConfig),
        *(Activity, Calendar, Gaps, Baskets, Conversions, Diversity, MeanCodes, Money, Prices, Propensities),
        *(ReducedRankConfig, PairScorerConfig, StackingConfig, ContrastiveConfig, MultitaskConfig),
        *(EncoderConfig, ConcatenatedEventConfig, ProjectedEventConfig, PLEConfig),
    )
}


def to_plain(value: Any) -> Any:
    """A configuration as JSON-able data."""
    if is_dataclass(value) and not isinstance(value, type):
        named = {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
        return {"class": _CLASSES[type(value).__name__].__name__, **named}
    if isinstance(value, Mapping):
        return {name: to_plain(one) for name, one in value.items()}
    return [to_plain(one) for one in value] if isinstance(value, list | tuple) else value


def from_plain(value: Any, file: str) -> Any:
    """Reads what `to_plain` gave; only the configurations of this package are made.

    Raises:
        DataError: another class, or fields that it does not have.
    """
    if isinstance(value, list):
        return tuple(from_plain(one, file) for one in value)
    if not isinstance(value, dict):
        return value
    named = {name: from_plain(one, file) for name, one in value.items() if name != "class"}
    if "class" not in value:
        return named
    try:
        return _CLASSES[value["class"]](**named)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: configuration must be one of this version, got '{value['class']}' ({error}); make the run again"
        ) from error
