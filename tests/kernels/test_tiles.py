"""The tables of tiles: every problem has an entry on every device, and what a sweep writes wins for its card."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from ubp_fast.kernels import tiles
from ubp_fast.kernels.flash_attention import _triton as attention
from ubp_fast.kernels.nt_xent import _triton as contrastive

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tune_tiles import write_row

CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_every_problem_has_tiles_on_every_device(capability: tuple[int, int]) -> None:
    names = ("a card nobody tuned", *tiles.architecture(capability))
    kinds, lengths = ("plain", "options", "float32"), (0.0, 1.5, 12.0, 12.5, 48.0, 160.0, 161.0, 1e6)
    for kernel, kind, width, length in itertools.product(("forward", "dq", "dkv"), kinds, range(1, 257), lengths):
        found = attention.Tiles(*tiles.choose(attention.TABLE, names, kernel, kind, width, length))
        assert min(found[:4]) >= 1 and found.block_m % 16 == found.block_n % 16 == 0
    for kernel, dtype, width in itertools.product(
        ("statistics", "gradient"), (torch.float32, torch.float16), (1, 16, 64, 65, 128, 129, 256, 257, 2048)
    ):
        assert contrastive.tiles(kernel, dtype, width, names).block_k >= 16


def test_longer_sequences_take_other_tiles() -> None:
    def rows(length: float) -> int:
        return tiles.choose(attention.TABLE, ("sm_80",), "forward", "plain", 64, length)[0]

    assert [rows(length) for length in (12, 160, 161)] == [64, 64, 128]


def test_sequences_share_tiles_only_where_they_are_short() -> None:
    def rows(length: float, width: int = 64, kind: str = "plain") -> int | None:
        found = tiles.find(attention.TABLE, ("sm_90",), "short_backward", kind, width, length)
        return None if found is None else found[0]

    assert [rows(length) for length in (1, 24, 25, 96, 97)] == [64, 64, 128, 128, None]
    assert rows(40, 256) == 64 and rows(90, 256) is None and rows(40, 64, "float32") is None


def test_a_written_row_wins_on_its_card_alone(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    table.write_text(attention.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    before = json.loads(table.read_text(encoding="utf-8"))
    for numbers in ([1, 2, 3, 4], [5, 6, 7, 8]):  # the second in place of the first
        write_row(table, "Some Card", "dq plain", [64, 48, numbers])
    assert tiles.choose(table, ("Some Card", "sm_80"), "dq", "plain", 60, 40) == [5, 6, 7, 8]
    assert tiles.choose(table, ("sm_80",), "dq", "plain", 60, 40) == [64, 64, 4, 2]
    assert json.loads(table.read_text(encoding="utf-8")) == {
        **before,
        "Some Card": {"dq plain": [[64, 48, [5, 6, 7, 8]]]},
    }


def test_lengths_that_a_sweep_left_out_fall_back_to_the_architecture(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    table.write_text(attention.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    write_row(table, "Some Card", "dq plain", [64, 48, [1, 2, 3, 4]])
    names = ("Some Card", "sm_80")
    assert tiles.choose(table, names, "dq", "plain", 64, 49) == [64, 64, 4, 2]
    assert tiles.choose(table, names, "dq", "plain", 64, 40) == [1, 2, 3, 4]
    assert tiles.choose(table, names, "dq", "plain", 64, 1000) == [128, 64, 8, 2]


def test_cards_of_little_shared_memory_take_no_large_tiles() -> None:
    for kernel in ("forward", "dq", "dkv"):
        large, small = (
            tiles.choose(attention.TABLE, tiles.architecture(capability), kernel, "plain", 256, 1e4)
            for capability in ((8, 0), (8, 6))
        )
        assert small == [32, 32, 8, 1] and max(large[:2]) >= 32


def test_a_missing_entry_is_named(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    table.write_text("{}", encoding="utf-8")
    with pytest.raises(KeyError, match=r"no tiles of dq, plain, width 64, length 3 for any of \['sm_80'\]"):
        tiles.choose(table, ("sm_80",), "dq", "plain", 64, 3)
