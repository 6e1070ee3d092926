"""A small run in one pass, whose sums have many parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import CLOSED_FORMS, few_rows, run_tiny

from ubp_fast.features import scaling


@pytest.fixture(scope="module")
def small_parts() -> Iterator[None]:
    """Clients of a part of a sum are few, so that small data has many parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "ROWS_AT_ONCE", scaling.ROWS_AT_ONCE)
        few_rows()
        yield


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory: pytest.TempPathFactory, small_parts: None) -> Path:
    code, run, said = run_tiny(tmp_path_factory.mktemp("one"), *CLOSED_FORMS)
    assert code == 0, said
    return run
