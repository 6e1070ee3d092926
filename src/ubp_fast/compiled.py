"""Functions compiled by Numba and kept on disk, so that the next process need not compile them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numba


def njit(function: Callable[..., Any]) -> Any:
    """`numba.njit` without the interpreter's lock; in memory, with a warning, where no folder can be written."""
    try:
        compiled: Any = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        _warn()
        return numba.njit(nogil=True)(function)
    # The folder may fill up, or belong to somebody else, after Numba has tried it.
    cache = compiled._cache
    cache.load_overload, cache.save_overload = _forgiving(cache.load_overload), _forgiving(cache.save_overload)
    return compiled


def _forgiving(access: Callable[..., Any]) -> Callable[..., Any]:
    def tried(*arguments: Any) -> Any:
        try:
            return access(*arguments)
        except OSError:
            _warn()
            return None

    return tried


@functools.cache
def _warn() -> None:
    warnings.warn(
        "Numba cannot keep what it compiles: every process compiles anew, which takes seconds; set NUMBA_CACHE_DIR to a"
        " folder that can be written",
        stacklevel=3,
    )
