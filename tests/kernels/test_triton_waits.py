"""No launch of flash_attention and nt_xent waits for the device: on a GPU PyTorch itself says so, elsewhere a stub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.attention import with_gradients
from support.cases import PackedCase, case_options, packed_inputs
from support.contrastive_cases import options, pair
from support.gpu import DEVICE, HAS_GPU, require_triton_device
from support.waits import WouldWait, nothing_waits
from torch import Tensor

from ubp_fast.kernels import check_deferred, deferred, flash_attention, nt_xent
from ubp_fast.kernels.flash_attention import _triton
from ubp_fast.kernels.nt_xent import _triton as contrastive
from ubp_fast.kernels.nt_xent.api import NEGATIVES

require_triton_device()

EVERYTHING = PackedCase("everything", (3, 0, 5), heads=1, width=8, window=(4, 1), buckets=20, dropout_p=0.3)
CROSS = PackedCase("cross", (3, 0, 5), (2, 4, 1), heads=1, width=8, is_causal=True)


@pytest.fixture
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    @contextmanager
    def on_a_device() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check_deferred()

    return on_a_device if HAS_GPU else lambda: nothing_waits(monkeypatch)


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks are deferred here, too."""
    if not HAS_GPU:
        monkeypatch.setattr(deferred, "is_deferred", lambda device: True)


def on_device(tensors: Any) -> list[Tensor]:
    return [part.to(DEVICE) for part in tensors]


@pytest.mark.parametrize("case", [EVERYTHING, CROSS], ids=str)
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
def test_attention(case: PackedCase, offsets: torch.dtype, without_waiting: Callable[[], Any]) -> None:
    query, key, value, *sides = on_device(packed_inputs(case, torch.float16))
    # Only tensors: a number of the seed's kind is made on the device by the call.
    given = {name: part.to(DEVICE) if isinstance(part, Tensor) else part for name, part in case_options(case).items()}
    sides = [part.to(offsets) for part in sides]
    leaves = [part.detach().requires_grad_() for part in (query, key, value)]
    for _ in range(2):
        with without_waiting():
            output = flash_attention(*leaves, *sides, backend="triton", **given)
            torch.autograd.grad(output, leaves, output.detach())
    wanted = with_gradients(case, on_device(packed_inputs(case, torch.float16)), "triton")
    torch.testing.assert_close(output, wanted[0])


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("used", [(), ("weight", "valid", "ids")], ids=["plain", "options"])
@pytest.mark.parametrize("is_learned", [True, False], ids=["learned", "fixed"])
def test_contrastive_loss(
    negatives: str, used: tuple[str, ...], is_learned: bool, without_waiting: Callable[[], Any]
) -> None:
    left, right = (side.requires_grad_() for side in on_device(pair(9, 8, torch.float16)))
    chosen = {name: part.to(DEVICE) for name, part in options(9).items() if name in used}
    tau: Any = torch.tensor(0.1, device=DEVICE, requires_grad=True) if is_learned else 0.1
    wanted = [left, right, tau] if is_learned else [left, right]
    with without_waiting():
        loss = nt_xent(left, right, temperature=tau, negatives=negatives, backend="triton", **chosen)
        torch.autograd.grad(loss, wanted)
    torch.testing.assert_close(loss, nt_xent(left, right, temperature=0.1, negatives=negatives, **chosen))


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_contrastive_loss_of_chunks(
    negatives: str, monkeypatch: pytest.MonkeyPatch, without_waiting: Callable[[], Any]
) -> None:
    monkeypatch.setattr(contrastive, "CHUNK", (4, 3))
    monkeypatch.setattr(contrastive, "LEAST_CHUNKED", (1, 0))
    test_contrastive_loss(negatives, ("weight", "valid", "ids"), True, without_waiting)


def test_the_stub_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(4, 3)
    for waiting in (
        lambda: float(rows.sum()),
        lambda: rows[rows[:, 0] > 0],
        lambda: rows.nonzero(),
        lambda: rows.unique(),
        lambda: bool((rows > 0).any()),
    ):
        with pytest.raises(WouldWait), nothing_waits(monkeypatch):
            waiting()


def test_wrong_offsets_are_raised_later(deferring: None) -> None:
    """They are empty sequences until then: no kernel leaves its tensors."""
    query = torch.randn(8, 1, 8, device=DEVICE)
    for wrong, name in (([0, 99, 8], "cu_seqlens"), ([1, 3, 8], "cu_seqlens"), ([0, 3, 7], "cu_seqlens_key")):
        offsets = {"cu_seqlens": torch.tensor([0, 3, 8], device=DEVICE), name: torch.tensor(wrong, device=DEVICE)}
        flash_attention(query, query, query, **offsets, backend="triton")
        with pytest.raises(ValueError, match=f"{name} must start at 0, never decrease and end at the number of rows"):
            check_deferred()
        check_deferred()  # once


def test_offsets_are_checked_once_until_they_change(deferring: None, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    fault = deferred.fault
    monkeypatch.setattr(deferred, "fault", lambda *facts: (looked.append(facts[2]), fault(*facts))[1])
    query, offsets = torch.randn(8, 1, 8, device=DEVICE), torch.tensor([0, 3, 8], device=DEVICE)
    leaf = query.clone().requires_grad_()
    for _ in range(3):
        flash_attention(leaf, query, query, offsets, backend="triton").sum().backward()
    assert len(looked) == 1
    offsets[1] = 99
    for _ in range(2):  # wrong ones are told every time
        flash_attention(query, query, query, offsets, backend="triton")
        with pytest.raises(ValueError, match="must start at 0"):
            check_deferred()
    assert len(looked) == 2


def test_packs_are_made_once_for_all_layers(deferring: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = _triton._packs
    monkeypatch.setattr(_triton, "_packs", lambda *facts: (made.append(facts[1]), make(*facts))[1])
    query, offsets = torch.randn(8, 1, 8, device=DEVICE, dtype=torch.float16), torch.tensor([0, 3, 8], device=DEVICE)
    leaf = query.clone().requires_grad_()
    for _ in range(3):
        flash_attention(leaf, query, query, offsets, backend="triton").sum().backward()
    assert made == sorted(set(made)) and made
    for end in (2, 5):  # other keys every time: the last ones alone are kept
        keys = torch.tensor([0, end, 8], device=DEVICE)
        found = flash_attention(leaf, query, query, offsets, keys, backend="triton")
        wanted = flash_attention(query, query, query, offsets, keys, backend="reference")
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    assert len(offsets._ubp_fast_checked[1]._ubp_fast_packs) <= 2  # sizes of packs
    offsets[1] = 4
    found = flash_attention(leaf, query, query, offsets, backend="triton")
    wanted = flash_attention(query, query, query, offsets, backend="reference")
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    assert len(made) > len(set(made))


def test_pairs_are_found_once_until_times_change(deferring: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, sorted_pairs = [], []
    make, sort = _triton._pairs, _triton._order_of_pairs
    monkeypatch.setattr(_triton, "_pairs", lambda *facts: (made.append(facts[2]), make(*facts))[1])
    monkeypatch.setattr(_triton, "_order_of_pairs", lambda *facts: (sorted_pairs.append(1), sort(*facts))[1])
    query, offsets = torch.randn(8, 1, 8, device=DEVICE, dtype=torch.float16), torch.tensor([0, 3, 8], device=DEVICE)
    leaf, bias = query.clone().requires_grad_(), torch.randn(1, 20, device=DEVICE)
    stamps = torch.arange(8, device=DEVICE) * 1000

    def attention(backend: str, **options: Any) -> Tensor:
        return flash_attention(
            leaf, query, query, offsets, time_bias=bias, timestamp_s=stamps, backend=backend, **options
        )

    attention("triton")
    assert made and not sorted_pairs  # for backward alone
    for _ in range(3):
        attention("triton").sum().backward()
    assert made == sorted(set(made)) and len(sorted_pairs) == 1
    before = len(made)
    attention("triton", causal=True)
    assert len(made) == before + 1  # of another window
    stamps[2:] += 10**6
    torch.testing.assert_close(attention("triton"), attention("reference"), rtol=0, atol=0.02)
    assert len(made) == before + 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"left": float("nan")}, "left must be finite in every valid row"),
        ({"right": float("inf")}, "right must be finite in every valid row"),
        ({"temperature": 0.0}, "temperature must be finite and > 0"),
        ({"weight": -1.0}, "weight must be finite and >= 0"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about what is computed from them
def test_bad_numbers_are_raised_by_a_later_call(change: dict[str, float], text: str, deferring: None) -> None:
    left, right = on_device(pair(5, 4, torch.float32))
    weight, tau = torch.ones(5, device=DEVICE), torch.tensor(0.1, device=DEVICE)
    rows = {"left": left, "right": right, "weight": weight}
    nt_xent(left, right, temperature=tau, weight=weight, backend="triton")
    for name, value in change.items():
        if name == "temperature":
            tau.fill_(value)
        else:
            rows[name][2] = value
    nt_xent(left, right, temperature=tau, weight=weight, backend="triton")
    good = on_device(pair(5, 4, torch.float32))

    def later() -> None:
        for _ in range(3):
            if HAS_GPU:
                torch.cuda.synchronize()
            nt_xent(*good, backend="triton")

    with pytest.raises(ValueError, match=text):
        later()
    later()


@pytest.mark.gpu
def test_calls_can_be_captured_in_a_graph() -> None:
    left, right = on_device(pair(64, 32, torch.bfloat16))
    query, offsets = torch.randn(64, 2, 32, device=DEVICE, dtype=torch.bfloat16), torch.tensor([0, 30, 64]).to(DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        return nt_xent(left, right, backend="triton"), flash_attention(query, query, query, offsets, backend="triton")

    wanted = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    check_deferred()
