"""Compiled functions are kept on disk where that is possible, and work where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import importlib.util, os, sys, warnings
from ubp_fast.compiled import njit
spec = importlib.util.spec_from_file_location("doubling", sys.argv[1])
module = importlib.util.module_from_spec(spec)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    spec.loader.exec_module(module)
    if sys.argv[2] == "full":  # the folder was there when it was tried
        os.rename(os.environ["NUMBA_CACHE_DIR"], os.environ["NUMBA_CACHE_DIR"] + "-gone")
        open(os.environ["NUMBA_CACHE_DIR"], "w").close()
    print(module.doubled(21), [str(warning.message) for warning in said])
"""


@pytest.mark.parametrize("folder", ["writable", "missing", "full"])
def test_without_a_folder_for_the_cache(tmp_path: Path, folder: str) -> None:
    """A file in the place of a folder cannot be written by anybody, root included."""
    module = tmp_path / "doubling.py"
    module.write_text("from ubp_fast.compiled import njit\n\n\n@njit\ndef doubled(x):\n    return 2 * x\n")
    cache = tmp_path / "cache"
    if folder == "missing":
        cache.touch()
        (tmp_path / "__pycache__").touch()
    environment = os.environ | {"HOME": str(cache), "XDG_CACHE_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    if folder != "missing":
        environment["NUMBA_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(module), folder], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith("42 ")
    assert ("set NUMBA_CACHE_DIR to a folder that can be written" in done.stdout) == (folder != "writable")
    assert (len(list(cache.rglob("*.nbi"))) == 1) == (folder == "writable")
