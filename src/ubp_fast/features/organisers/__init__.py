"""The organisers' aggregated features: from the store (`counts.py`) or straight from the tables (`once.py`)."""

from ubp_fast.features.organisers.counts import CountsConfig, count_features
from ubp_fast.features.organisers.once import count_features_once

__all__ = ["CountsConfig", "count_features", "count_features_once"]
