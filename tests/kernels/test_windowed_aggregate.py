"""windowed_aggregate: the compiled backend equals the Polars reference, the reference equals the definition."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ubp_fast.kernels.backends import BackendUnavailable
from ubp_fast.kernels.windowed_aggregate import (
    SparseCounter,
    WindowedAggregate,
    sparse_decay,
    window_aggregator,
    windowed_aggregate,
)

INTEGERS = ("totals", "counts", "distinct", "distinct_times", "first_age_s", "last_age_s", "num_events", "sums")
ANCHOR_S = 1_000


def shop(counts: list[int], times: list[int], codes: list[int], num_codes: int = 5, seed: int = 0) -> dict[str, Any]:
    """Arguments for clients with these numbers of events; times are sorted inside every client."""
    generator = np.random.default_rng(seed)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
    timestamp_s = np.array(times, np.int64)
    for start, end in itertools.pairwise(offsets):
        timestamp_s[start:end].sort()
    slots = np.stack((generator.integers(-1, 3, num_codes), generator.integers(2, 6, num_codes)), axis=1)
    return {
        "offsets": offsets,
        "timestamp_s": timestamp_s,
        "codes": np.array(codes, np.int32),
        "slots": slots,
        "num_slots": 6,
        "groups": np.stack((np.arange(num_codes), generator.integers(-1, 3, num_codes)), axis=1),
        "values": generator.integers(-3, 100, (num_codes, 2)).astype(float),
        "half_lives_s": (7.0, 1e6),
        "periods_s": (1, 60),
        "anchor_s": ANCHOR_S,
        "windows_s": (1, 10, 100, 500, None),
    }


def call(arguments: dict[str, Any], **change: Any) -> WindowedAggregate:
    arguments = {**arguments, **change}
    events = [arguments.pop(name) for name in ("offsets", "timestamp_s", "codes")]
    return windowed_aggregate(*events, **arguments)


def assert_same(found: WindowedAggregate, wanted: WindowedAggregate) -> None:
    for name, mine, theirs in zip(WindowedAggregate._fields, found, wanted, strict=True):
        assert mine.dtype == theirs.dtype, name
        if name in INTEGERS:
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
        else:
            # Entropy is a difference of logarithms, so its rounding follows them and not the difference.
            atol = 1e-13 if name == "entropy" else 0
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=atol, err_msg=name)


@st.composite
def shops(draw: st.DrawFn) -> dict[str, Any]:
    """Few distinct times (ties, window edges, the anchor, later events), clients of no events and of all of them."""
    counts = draw(st.lists(st.integers(0, 12), min_size=0, max_size=6))
    if counts and draw(st.booleans()):
        counts = [0] * len(counts) + [sum(counts)]
    events = sum(counts)
    edges = [ANCHOR_S - window + step for window in (0, 1, 10, 100, 500) for step in (-1, 0, 1)]
    time = st.one_of(st.sampled_from(edges), st.integers(-2000, 1100), st.integers(-(2**61), 2**61))
    times = draw(st.lists(time, min_size=events, max_size=events))
    codes = draw(st.lists(st.integers(0, 4), min_size=events, max_size=events))
    return shop(counts, times, codes, seed=draw(st.integers(0, 5)))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(arguments=shops(), include_anchor=st.booleans())
def test_numba_equals_the_reference_on_random_shops(arguments: dict[str, Any], include_anchor: bool) -> None:
    wanted = call(arguments, include_anchor=include_anchor, backend="reference")
    found = call(arguments, include_anchor=include_anchor, backend="numba")
    assert_same(found, wanted)
    names = ("offsets", "timestamp_s", "codes", "anchor_s", "windows_s", "slots", "num_slots")
    offsets, timestamp_s, codes, *others = (arguments[name] for name in names)
    sparse = SparseCounter(
        offsets, timestamp_s, codes, **dict(zip(names[3:], others, strict=True)), include_anchor=include_anchor
    )
    ends = np.cumsum(sparse.lengths)
    indices, counts = np.empty(int(sparse.lengths.sum()), np.int32), np.empty(int(sparse.lengths.sum()), np.float32)
    sparse.fill(ends - sparse.lengths, 0, indices, counts)
    dense = wanted.counts.reshape(len(offsets) - 1, 5 * 6)
    rows, columns = np.nonzero(dense)
    np.testing.assert_array_equal(np.repeat(np.arange(len(dense)), sparse.lengths), rows)
    np.testing.assert_array_equal(indices, columns)
    np.testing.assert_array_equal(counts, dense[rows, columns])


def entropy_of(groups: list[int]) -> float:
    counts = np.array([groups.count(group) for group in set(groups)])
    return float(-(counts / len(groups) * np.log(counts / len(groups))).sum()) if groups else 0.0


def by_hand(arguments: dict[str, Any], include_anchor: bool) -> dict[str, np.ndarray]:
    """The definition with Python sets and loops."""
    offsets, times, codes = (arguments[name] for name in ("offsets", "timestamp_s", "codes"))
    result: dict[str, list] = {name: [] for name in WindowedAggregate._fields}
    limit = ANCHOR_S + include_anchor
    for start, end in itertools.pairwise(offsets):
        events = [(int(t), int(c)) for t, c in zip(times[start:end], codes[start:end], strict=True) if t < limit]
        names = ("totals", "counts", "distinct", "distinct_times", "sums", "entropy")
        rows: dict[str, list] = {name: [] for name in names}
        for window in arguments["windows_s"]:
            inside = [(t, c) for t, c in events if window is None or t >= ANCHOR_S - window]
            rows["totals"].append(len(inside))
            hits = [slot for _, c in inside for slot in arguments["slots"][c] if slot >= 0]
            rows["counts"].append([hits.count(slot) for slot in range(6)])
            groups = [[group for _, c in inside if (group := int(arguments["groups"][c, d])) >= 0] for d in range(2)]
            rows["distinct"].append([len(set(group)) for group in groups])
            rows["entropy"].append([entropy_of(group) for group in groups])
            rows["distinct_times"].append([len({t // p for t, _ in inside}) for p in arguments["periods_s"]])
            rows["sums"].append([sum(arguments["values"][c, v] for _, c in inside) for v in range(2)])
        for name, row in rows.items():
            result[name].append(row)
        weights = [[(0.5 ** ((ANCHOR_S - t) / h), c) for t, c in events] for h in arguments["half_lives_s"]]
        result["decayed_totals"].append([sum(w for w, _ in row) for row in weights])
        result["decayed_counts"].append(
            [
                [sum(w for w, c in row for s in arguments["slots"][c] if s == slot) for slot in range(6)]
                for row in weights
            ]
        )
        result["num_events"].append(len(events))
        result["first_age_s"].append(ANCHOR_S - events[0][0] if events else -1)
        result["last_age_s"].append(ANCHOR_S - events[-1][0] if events else -1)
    return {name: np.array(rows) for name, rows in result.items()}


@pytest.mark.parametrize("include_anchor", [False, True], ids=["before", "up_to"])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_equals_the_definition(backend: str, include_anchor: bool) -> None:
    generator = np.random.default_rng(1)
    counts = [0, 5, 40, 0, 1]
    times = generator.choice([ANCHOR_S, ANCHOR_S - 1, ANCHOR_S - 10, ANCHOR_S - 11, 700, 3, ANCHOR_S + 1], sum(counts))
    arguments = shop(counts, times.tolist(), generator.integers(0, 5, sum(counts)).tolist())
    found = call(arguments, include_anchor=include_anchor, backend=backend)
    for name, wanted in by_hand(arguments, include_anchor).items():
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-12, atol=1e-14, err_msg=name)


def test_window_holds_its_start_and_not_the_anchor() -> None:
    offsets, times = np.array([0, 4]), np.array([89, 90, 99, 100])
    before = windowed_aggregate(offsets, times, anchor_s=100, windows_s=[10])
    assert before.totals.tolist() == [[2]]
    assert (before.first_age_s[0], before.last_age_s[0], before.span_s[0]) == (11, 1, 10)
    assert windowed_aggregate(offsets, times, anchor_s=100, windows_s=[10], include_anchor=True).totals.tolist() == [
        [3]
    ]


def test_means_are_zero_where_a_window_is_empty() -> None:
    found = windowed_aggregate(
        np.array([0, 2, 2]),
        np.array([5, 95]),
        np.array([0, 1]),
        anchor_s=100,
        windows_s=[10, None],
        values=np.array([4, 8]),
    )
    assert found.means[..., 0].tolist() == [[8, 6], [0, 0]]
    assert found.first_age_s.tolist() == [95, -1]
    assert found.span_s.tolist() == [90, 0]


def test_ratios_of_neighbouring_windows() -> None:
    found = windowed_aggregate(np.array([0, 4, 4]), np.array([1, 2, 60, 95]), anchor_s=100, windows_s=[10, 50, None])
    assert found.ratios.tolist() == [[0.5, 0.5], [0, 0]]


def test_old_events_and_long_half_lives() -> None:
    """Decay tables end at 8.5 years; what is older, and counts beyond the table of logarithms, are computed."""
    ages = np.array([10**12, 3 * 10**8, 2**28 + 1, 2**28 - 1, 4096, 4095, 1, 0] + [5] * 10_000)
    arguments = {"half_lives_s": (5e8, 1e3), "groups": np.array([0]), "windows_s": (None,), "include_anchor": True}
    times, codes = np.sort(-ages), np.zeros(len(ages), np.int32)
    found = windowed_aggregate(np.array([0, len(ages)]), times, codes, anchor_s=0, **arguments)
    wanted = [sum(0.5 ** (age / half_life) for age in ages.tolist()) for half_life in (5e8, 1e3)]
    np.testing.assert_allclose(found.decayed_totals[0], wanted, rtol=1e-12)
    reference = windowed_aggregate(np.array([0, len(ages)]), times, codes, anchor_s=0, **arguments, backend="reference")
    assert found.entropy[0, 0, 0] == reference.entropy[0, 0, 0] == 0
    many = np.arange(len(ages), dtype=np.int32) // 9_000
    found, reference = (
        windowed_aggregate(
            np.array([0, len(ages)]), times, many, anchor_s=0, windows_s=(None,), groups=np.arange(2), backend=backend
        )
        for backend in ("numba", "reference")
    )
    np.testing.assert_allclose(found.entropy, reference.entropy, rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_counts_go_to_columns_of_a_memory_map(backend: str, tmp_path: Path) -> None:
    arguments = random_shop()
    wanted = call(arguments).counts
    clients, windows, slots = wanted.shape
    matrix = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (clients, 3 + windows * slots))
    target = matrix[:, 2:-1].reshape(clients, windows, slots)
    assert np.shares_memory(target, matrix)
    found = call(arguments, out=target, backend=backend)
    assert found.counts is target
    np.testing.assert_array_equal(matrix[:, 2:-1].reshape(wanted.shape), wanted)
    assert not matrix[:, :2].any()
    assert not matrix[:, -1].any()


def random_shop(clients: int = 300, seed: int = 5, most: int = 5_000) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    counts = generator.poisson(8, clients)
    counts[7] = most
    events = int(counts.sum())
    times = generator.integers(0, 1_200, events)
    return shop(counts.tolist(), times.tolist(), generator.integers(0, 5, events).tolist())


def test_results_do_not_depend_on_threads() -> None:
    # Enough events for several threads, most of them from one client.
    arguments = {**random_shop(3_000, most=130_000), "values": np.random.default_rng(6).standard_normal((5, 2))}
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call(arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, one, two in zip(WindowedAggregate._fields, results[0], other, strict=True):
            np.testing.assert_array_equal(one, two, err_msg=name)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_blocks_of_clients_equal_the_whole(backend: str) -> None:
    arguments = random_shop()
    whole = call(arguments, backend=backend)
    part = call(arguments, offsets=arguments["offsets"][100:151], backend=backend)
    assert_same(part, WindowedAggregate(*(array[100:150] for array in whole)))


def test_bands_add_up_to_windows() -> None:
    found = call(random_shop())
    assert (np.diff(found.totals, axis=1) >= 0).all()
    assert (np.diff(found.distinct, axis=1) >= 0).all()


def test_memory_mapped_columns(tmp_path: Any) -> None:
    arguments = random_shop()
    for name in ("offsets", "timestamp_s", "codes"):
        np.save(tmp_path / f"{name}.npy", arguments[name])
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("offsets", "timestamp_s", "codes")}
    assert_same(call(arguments, **mapped), call(arguments))


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("anchor_s", [1_000, 2**31 - 1, 2**40])
def test_timestamps_of_four_bytes(backend: str, anchor_s: int) -> None:
    arguments = random_shop() | {"anchor_s": anchor_s}
    limits = np.iinfo(np.int32)
    offsets = arguments["offsets"]
    arguments["timestamp_s"] = arguments["timestamp_s"].clip(limits.min, limits.max)
    arguments["timestamp_s"][offsets[:-1][np.diff(offsets) > 0][0]] = limits.min  # ages beyond 2^31 s
    narrow = arguments | {"timestamp_s": arguments["timestamp_s"].astype(np.int32)}
    assert_same(call(narrow, backend=backend), call(arguments, backend=backend))


def as_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def test_tensors_go_through_the_registered_op() -> None:
    arguments = random_shop(20)
    found = call(as_tensors(arguments))
    assert all(isinstance(array, torch.Tensor) for array in found)
    assert_same(WindowedAggregate(*(array.numpy() for array in found)), call(arguments))
    np.testing.assert_array_equal(found.means.numpy(), call(arguments).means)
    compiled = torch.compile(lambda x: call({**x}).counts * 2, fullgraph=True, backend="aot_eager")
    np.testing.assert_array_equal(compiled(as_tensors(arguments)).numpy(), call(arguments).counts * 2)


def test_opcheck() -> None:
    tensors = as_tensors(random_shop(20))
    arrays = [tensors[name] for name in ("offsets", "timestamp_s", "codes", "slots", "groups", "values")]
    scalars = (ANCHOR_S, [10, 2**62], 6, [3.0], [1], False, "numba")
    op = torch.ops.ubp_fast.windowed_aggregate.default
    torch.library.opcheck(op, (*arrays, *scalars))
    torch.library.opcheck(op, (*arrays[:2], None, None, None, None, *scalars))
    torch.library.opcheck(op, (*arrays[:3], arrays[3], None, arrays[5][:, 0], *scalars))


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("clients", [0, 1, 3])
def test_no_events_at_all(clients: int, backend: str) -> None:
    arguments = shop([0] * clients, [], [])
    found = call(arguments, backend=backend)
    assert found.counts.shape == (clients, 5, 6)
    assert not found.counts.any()
    assert (found.last_age_s == -1).all()


SMALL = {"offsets": np.array([0, 2, 3]), "timestamp_s": np.array([5, 9, 1]), "codes": np.array([0, 1, 1])}
WRONG = [
    ({"offsets": np.array([0, 2, 4])}, ValueError, r"offsets must lie in 0..3 \(rows of timestamp_s\), got 0..4"),
    ({"offsets": np.array([0, 3, 2])}, ValueError, "offsets must ascend, got 2 after 3 at entry 2"),
    ({"offsets": np.zeros(0, np.int64)}, ValueError, "offsets must have at least one entry"),
    ({"offsets": np.array([0.0, 3.0])}, TypeError, "offsets must be integers, got float64"),
    (
        {"timestamp_s": np.array([9, 5, 1])},
        ValueError,
        "timestamp_s must ascend inside every client, got 5 after 9 in row 1",
    ),
    ({"timestamp_s": np.array([[5, 9, 1]])}, ValueError, "timestamp_s must have 1 dimensions"),
    ({"codes": np.array([0, 2, 1])}, ValueError, "codes must lie in 0..1, got 2 in row 1"),
    ({"codes": np.array([0, -1, 1])}, ValueError, "codes must lie in 0..1, got -1 in row 1"),
    ({"codes": np.array([0, 1])}, ValueError, "codes must have length 3, got 2"),
    ({"codes": np.array([0, 1, 2**40])}, ValueError, "codes must fit int32"),
    ({"codes": None}, ValueError, "codes must be given"),
    ({"slots": np.array([0, 3])}, ValueError, r"slots must lie in -1..num_slots - 1 = 1, got 0..3"),
    ({"slots": np.array([0, -2])}, ValueError, "slots must lie in"),
    ({"groups": np.array([0, -2])}, ValueError, "groups must be >= -1, got -2"),
    ({"values": np.array([0, np.nan])}, ValueError, "values must be a finite"),
    ({"values": np.array([0.0])}, ValueError, "must have one length"),
    ({"windows_s": (0,)}, ValueError, "windows_s must be > 0 and ascending"),
    ({"windows_s": (5, 2)}, ValueError, "windows_s must be > 0 and ascending"),
    ({"windows_s": (None, 2)}, ValueError, "None only as the last one"),
    ({"half_lives_s": (0.0,)}, ValueError, "half_lives_s must be finite and > 0"),
    ({"periods_s": (0,)}, ValueError, "periods_s must be > 0"),
    ({"anchor_s": 2**63}, ValueError, "anchor_s must be a time in seconds"),
    ({"offsets": torch.tensor([0, 2, 3])}, TypeError, "all NumPy or all tensors"),
    ({"backend": "triton"}, BackendUnavailable, "triton"),
    ({"out": np.zeros((2, 1, 3), np.int32)}, ValueError, r"out must be writeable int32 or float32 \[2, 1, 2\]"),
    ({"out": np.zeros((2, 1, 2))}, ValueError, "got float64"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {**SMALL, "anchor_s": 10, "windows_s": (5,), "slots": np.array([0, 1]), "num_slots": 2}
    with pytest.raises(error, match=message):
        call(good, **change)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_the_same_aggregation_of_other_events(backend: str) -> None:
    """Tables are checked once; events are checked each time."""
    one = shop([2, 3], [5, 9, 1, 2, 990], [0, 4, 1, 1, 2])
    other = shop([1, 0, 2], [3, 8, 900], [4, 3, 0])
    events = [one.pop(name) for name in ("offsets", "timestamp_s", "codes")]
    aggregator = window_aggregator(*events, **one, backend=backend)
    theirs = [other[name] for name in ("offsets", "timestamp_s", "codes")]
    assert_same(aggregator.on(*theirs)(), call(other | one, backend=backend))
    assert_same(aggregator(), windowed_aggregate(*events, **one, backend=backend))
    with pytest.raises(ValueError, match=r"codes must lie in 0..4, got 5 in row 1"):
        aggregator.on(theirs[0], theirs[1], np.array([0, 5, 1], np.int32))
    with pytest.raises(ValueError, match="must ascend inside every client"):
        aggregator.on(np.array([0, 3]), theirs[1][::-1].copy(), theirs[2])


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(arguments=shops())
def test_sparse_decay_is_the_dense_one_without_its_zeros(arguments: dict[str, Any]) -> None:
    given = {name: arguments[name] for name in ("offsets", "timestamp_s", "codes", "slots", "num_slots", "anchor_s")}
    dense = call(given, half_lives_s=(7.0, 1e6))
    events = [given.pop(name) for name in ("offsets", "timestamp_s", "codes")]
    found = sparse_decay(*events, **given, half_lives_s=(7.0, 1e6))
    assert found.totals.tobytes() == dense.decayed_totals.tobytes()
    client = np.repeat(np.arange(len(found.totals)), np.diff(found.offsets))
    assert (np.diff(client * 6 + found.slots) > 0).all(), "ascending, each once"
    counts = np.zeros_like(dense.decayed_counts)
    counts[client, :, found.slots] = found.counts
    assert counts.tobytes() == dense.decayed_counts.tobytes()
