"""One small shop for all model tests."""

from __future__ import annotations

import pytest
from support.shops import make_store

from ubp_fast.store.event_store import EventStore


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return make_store(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def purchases_store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return make_store(tmp_path_factory.mktemp("purchases"), kinds=("product_buy",))
