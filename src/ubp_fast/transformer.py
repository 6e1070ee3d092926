"""Steps of scikit-learn pipelines: events to vectors, and vectors to the columns that a linear model wants."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import torch

from ubp_fast.evaluation.readers.forecasts import evidence, log_means
from ubp_fast.evaluation.readers.linear import FIRST, FIRST_COLUMNS, FIRST_FORECASTS, OTHERS
from ubp_fast.files import save_table
from ubp_fast.pipeline.command import run
from ubp_fast.profiler import Profiler
from ubp_fast.profiler.reading import frame_of, seconds_of

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(f"ubp_fast.transformer needs scikit-learn ({error}): pip install 'ubp_fast[sklearn]'") from error


# Tables that scikit-learn wraps around results would have a row per event.
class ProfileTransformer(TransformerMixin, BaseEstimator, auto_wrap_output_keys=None):  # type: ignore[call-arg]
    """Vectors of clients as a step of a scikit-learn pipeline.

    The rows that go in are events, those that come out are clients: in the order of `clients`, so that `y` can be
    theirs, else ascending by id. Nothing at or after `at` is learned from or looked at.

    Args:
        client_column, timestamp_column, sku_column: columns of the events.
        settings: further settings of a run by name, such as {"data.price_column": "price", "experiment": "best"}.
        at: the moment of the vectors, seconds since 1970 UTC, a date or a date-time; None: just after the newest event.
        clients: ids of the rows wanted, in their order, without events, too; None: all that have an
            event before the moment.
        blocks: names of the blocks wanted; None: all.

    Attributes:
        model_: the files of the fitted model, name -> bytes; so a pickled pipeline is whole.
    """

    def __init__(
        self,
        client_column: str = "client_id",
        timestamp_column: str = "timestamp",
        sku_column: str = "sku",
        *,
        settings: Mapping[str, object] | None = None,
        at: int | str | date | datetime | None = None,
        clients: Any = None,
        blocks: Sequence[str] | None = None,
    ) -> None:
        self.client_column = client_column
        self.timestamp_column = timestamp_column
        self.sku_column = sku_column
        self.settings = settings
        self.at = at
        self.clients = clients
        self.blocks = blocks

    def fit(self, X: Any, y: Any = None) -> ProfileTransformer:
        """Learns from the events before the moment.

        Args:
            X: events as a polars, pandas or Arrow table.
            y: not looked at; the vectors know no labels.

        Raises:
            UserError, DataError: a setting, or the events, break a rule.
        """
        with TemporaryDirectory() as folder:
            path = Path(folder) / "events.parquet"
            save_table(path, frame_of(X))
            names = {"client": self.client_column, "timestamp": self.timestamp_column, "sku": self.sku_column}
            chosen: dict[str, object] = {
                "data": "table",
                "data.path": str(path),
                **{f"data.{name}_column": column for name, column in names.items()},
                **({} if self.at is None else {"data.end": _written(self.at)}),
                **(self.settings or {}),
                "root": folder,
                "directory": str(Path(folder) / "run"),
                "profiles.at": "end",
                "evaluation": "off",
            }
            model = run(chosen, quiet=True) / "model"
            files = [path for path in model.rglob("*") if path.is_file()]
            self.model_ = {str(path.relative_to(model)): path.read_bytes() for path in files}
        if hasattr(self, "_profiler"):
            del self._profiler
        return self

    @property
    def profiler_(self) -> Profiler:
        """The fitted model, unpacked into a temporary folder that goes with this object."""
        check_is_fitted(self, "model_")
        if not hasattr(self, "_profiler"):
            folder = Path(mkdtemp(prefix="ubp_fast-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            for name, content in self.model_.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._profiler = Profiler.load(folder)
        return self._profiler

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_profiler"}

    def transform(self, X: Any) -> np.ndarray:
        """float32 [clients, columns]; events, items and clients that `fit` has not seen are welcome.

        Args:
            X: events, whole histories, in the columns of `fit`.

        Raises:
            DataError: the events break a rule.
            UserError: an unknown block, or ids of another type than those of the events.
        """
        return self.profiler_.embed(frame_of(X), self.at, self.clients, self.blocks).embeddings.astype(np.float32)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns, `block: column`."""
        layout = self.profiler_.layout
        chosen = layout if self.blocks is None else layout.select(*self.blocks)
        return np.array([f"{block.name}: {name}" for block in chosen.blocks for name in block.columns], dtype=object)


class RelevanceScaler(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Standardised columns, of which a penalty spares those that correlate most with the labels.

    For a linear model with a penalty behind vectors of hundreds of columns. A label that few clients have tells next to
    nothing of most columns; a penalty that holds those holds the telling ones as well, unless they are larger. They are
    ten times as large as a standardised column, as the evaluation's linear reader has them.

    Args:
        candidates: positions of columns that forecast, of profiles `profiles.layout.forecasts`: the one that says most
            of two classes, or correlates most with numbers, comes first, and columns that do not forecast are made
            smaller by the root of 20. None: three of all columns come first, and none is made smaller.

    Attributes:
        mean_, scale_: float64 [columns], what is subtracted, and what then divides.
        first_: positions of the columns that come first.
    """

    def __init__(self, candidates: Any = None) -> None:
        self.candidates = candidates

    def fit(self, X: Any, y: Any) -> RelevanceScaler:
        """Learns means, scales and which columns come first.

        Args:
            X: [clients, columns].
            y: one number per client, or one of two classes; one label at a time.

        Raises:
            ValueError: X or y is no such table, y has more than two classes that are no numbers, or a candidate is no
                position of a column.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        try:
            y = y.astype(np.float64)
        except ValueError:
            classes, y = np.unique(y, return_inverse=True)
            if len(classes) > 2:
                raise ValueError(
                    f"RelevanceScaler: y must be numbers or two classes, got {len(classes)} classes"
                ) from None
        self.mean_ = X.mean(axis=0)
        deviation = X.std(axis=0)
        # Of a column that is constant only roundings are left.
        is_constant = deviation <= 1e-6 * np.sqrt(np.mean(X**2, axis=0)) + 1e-15
        self.scale_ = np.where(is_constant, 1.0, deviation)
        standard = (X - self.mean_) / self.scale_
        relevance = standard.T @ (y - y.mean())
        everything = np.arange(X.shape[1])
        candidates = everything if self.candidates is None else np.unique(self.candidates)
        if candidates.dtype == bool or not np.isin(candidates, everything).all():
            last = everything[-1]
            raise ValueError(f"RelevanceScaler: candidates must be positions in 0..{last}, got {self.candidates}")
        candidates = candidates.astype(np.int64)
        says = np.abs(relevance[candidates])
        if self.candidates is not None and len(np.unique(y)) == 2:
            has = torch.from_numpy((y == y.max()).astype(np.float64))
            forecasts = torch.from_numpy(standard[:, candidates])
            says = evidence(forecasts.T @ has[:, None], has.sum()[None], len(y), log_means([forecasts]))[:, 0].numpy()
        self.scale_[np.setdiff1d(everything, candidates)] *= OTHERS**0.5
        count = FIRST_COLUMNS if self.candidates is None else FIRST_FORECASTS
        self.first_ = candidates[np.argsort(-says, kind="stable")[:count]]
        self.scale_[self.first_] *= FIRST**0.5
        return self

    def transform(self, X: Any) -> np.ndarray:
        """float64 [clients, columns]: X less the means, by the scales."""
        check_is_fitted(self)
        return (validate_data(self, X, dtype=np.float64, reset=False) - self.mean_) / self.scale_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _written(moment: int | str | date | datetime) -> str:
    """As a run reads it."""
    return datetime.fromtimestamp(seconds_of(moment), timezone.utc).replace(tzinfo=None).isoformat()
