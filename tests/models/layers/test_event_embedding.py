"""Event vectors, event by event, by hand."""

from __future__ import annotations

import pytest
import torch
from support.small_models import SMALL_EVENTS, whole_batch

from ubp_fast.models.layers.event_embedding import (
    ConcatenatedEventConfig,
    ConcatenatedEventEmbedding,
    EventSizes,
    PiecewiseLinearEncoding,
    ProjectedEventConfig,
    ProjectedEventEmbedding,
)
from ubp_fast.store.event_store import EventStore

DAY_S = 86_400


def test_piecewise_linear_encoding_by_hand() -> None:
    encoding = PiecewiseLinearEncoding(3)
    encoding.edges.copy_(torch.tensor([0.0, 2.0, 2.0, 6.0]))
    expected = [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [1.0, 1.0, 0.25], [1.0, 1.0, 1.0]]
    assert encoding(torch.tensor([-1.0, 1.0, 3.0, 60.0])).tolist() == expected


@pytest.mark.parametrize("with_age", [False, True])
def test_projected_vectors_by_hand(store: EventStore, with_age: bool) -> None:
    embedding = ProjectedEventEmbedding(SMALL_EVENTS, EventSizes.of(store))
    batch = whole_batch(store).history
    vectors = embedding(batch, with_age=with_age)
    assert vectors.shape == (batch.num_tokens, SMALL_EVENTS.width)
    for kind in range(1, 6):
        at = int((batch.kind == kind).nonzero()[-1])
        codes = embedding.codes.table.weight[batch.codes[at]].mean(0)
        parts = [embedding.kind.weight[kind]]
        if kind <= 3:
            name = "item"
            parts += [embedding.sku.weight[batch.sku[at]], embedding.category.weight[batch.category[at]]]
            parts += [embedding.price.weight[batch.price[at]], codes]
        elif kind == 4:
            name = "visit"
            parts += [embedding.url.weight[batch.url[at]]]
        else:
            name = "search"
            parts += [codes]
        weight = embedding.content[name].weight
        if with_age:
            age_days = batch.age_s()[at : at + 1].float() / DAY_S
            parts += [embedding.age_projection(embedding.age(age_days))[0]]
            weight = torch.cat([weight, embedding.content_age[name].weight], dim=1)
        expected = torch.relu(weight @ torch.cat(parts) + embedding.content[name].bias)
        torch.testing.assert_close(vectors[at], expected, rtol=1e-5, atol=1e-5)


def test_concatenated_vectors_by_hand(store: EventStore) -> None:
    config = ConcatenatedEventConfig(8, 16, 8, 4, 32, 4, 4, max_days=30)
    embedding = ConcatenatedEventEmbedding(config, EventSizes.of(store))
    batch = whole_batch(store).history
    vectors = embedding(batch)
    assert vectors.shape == (batch.num_tokens, config.width) == (batch.num_tokens, 48)
    assert (batch.age_s() >= 30 * DAY_S).any()
    for kind in range(1, 6):
        at = int((batch.kind == kind).nonzero()[0])
        codes = embedding.codes.table.weight[batch.codes[at]].mean(0)
        tables = [embedding.sku.weight[batch.sku[at]], embedding.category.weight[batch.category[at]]]
        tables += [embedding.price.weight[batch.price[at]], codes]
        if kind <= 3:
            content = torch.relu(embedding.item(torch.cat(tables)))
        else:
            content = embedding.url.weight[batch.url[at]] if kind == 4 else codes
        day = min(int(batch.age_s()[at]) // DAY_S, 29)
        time = [embedding.day.weight[day], embedding.week.weight[day // 7]]
        expected = torch.cat([embedding.kind.weight[kind], content, *time])
        torch.testing.assert_close(vectors[at], expected, rtol=1e-5, atol=1e-5)


def test_winner_widths_and_tables() -> None:
    config = ConcatenatedEventConfig()
    assert config.width == 412
    embedding = ConcatenatedEventEmbedding(config, EventSizes(4, 3, 3, 0, ("product_buy",)))
    assert embedding.day.weight.shape == (365, 16)
    assert embedding.week.weight.shape == (53, 4)


@pytest.mark.parametrize("config", [ConcatenatedEventConfig, ProjectedEventConfig])
def test_dtypes_of_tables(config: type[ConcatenatedEventConfig | ProjectedEventConfig]) -> None:
    with pytest.raises(ValueError, match=f"{config.__name__}: table_dtype must be .* got 'float16'"):
        config(table_dtype="float16")
    sizes = EventSizes(4, 3, 3, 5, ("product_buy", "page_visit"))
    embedding = {
        ConcatenatedEventConfig: ConcatenatedEventEmbedding,
        ProjectedEventConfig: ProjectedEventEmbedding,
    }[config](config(table_dtype="bfloat16"), sizes)
    rounded = {name for name, value in embedding.named_parameters() if value.dtype == torch.bfloat16}
    assert rounded == {"sku.weight", "url.weight"}


def test_absent_kinds_have_no_parameters(purchases_store: EventStore) -> None:
    sizes = EventSizes.of(purchases_store)
    names = {name for name, _ in ProjectedEventEmbedding(SMALL_EVENTS, sizes).named_parameters()}
    assert not [name for name in names if "url" in name or "visit" in name or "search" in name]
    assert not hasattr(ConcatenatedEventEmbedding(ConcatenatedEventConfig(8, 16), sizes), "url")
