"""Text -> 16 codes by hashing its words, for shops whose texts come without product-quantisation codes."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np
import polars as pl

from ubp_fast.events.schema import CODES, NUM_CODES

_WORD = re.compile(r"\w+")


def hash_texts(texts: pl.Series) -> pl.Series:
    """Codes u8[16] per text: code j belongs to word j modulo the number of words.

    Texts that share their words share codes; case and punctuation do not count. A null is an empty text.

    Args:
        texts: text series.

    Returns:
        series of the same name and length.
    """
    filled = texts.fill_null("")
    unique = filled.unique(maintain_order=True)
    codes = np.frombuffer(b"".join(map(_codes, unique)), np.uint8).reshape(-1, NUM_CODES)
    table = pl.DataFrame([unique.alias("text"), pl.Series("codes", codes, dtype=CODES)])
    joined = pl.DataFrame([filled.alias("text")]).join(table, on="text", how="left", maintain_order="left")
    return joined["codes"].alias(texts.name)


def _codes(text: str) -> bytes:
    words = _WORD.findall(text.lower())[:NUM_CODES] or [""]
    return bytes(_digest(words[j % len(words)])[j // len(words)] for j in range(NUM_CODES))


@lru_cache(maxsize=100_000)
def _digest(word: str) -> bytes:
    return hashlib.blake2b(word.encode(), digest_size=NUM_CODES).digest()
