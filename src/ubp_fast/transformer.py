"""scikit-learn's habits: fitted on a table of events, a transformer of such tables into one vector per client."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np

from ubp_fast.files import save_table
from ubp_fast.pipeline.command import run
from ubp_fast.profiler import Profiler
from ubp_fast.profiler.reading import frame_of, seconds_of

try:
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError(f"ProfileTransformer needs scikit-learn ({error}): pip install 'ubp_fast[sklearn]'") from error


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


def _written(moment: int | str | date | datetime) -> str:
    """As a run reads it."""
    return datetime.fromtimestamp(seconds_of(moment), timezone.utc).replace(tzinfo=None).isoformat()
