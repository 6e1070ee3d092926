"""The optimizers as a package: what importing and using them needs."""

from __future__ import annotations

import subprocess
import sys

WITHOUT = ("numba", "polars", "lightning", "schedulefree", "hydra", "torchmetrics", "triton", "matplotlib", "rich")


def run_without(code: str) -> str:
    """What the code prints in an interpreter that has PyTorch and NumPy alone."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({WITHOUT}))\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_optimizers_need_torch_and_numpy_alone() -> None:
    said = run_without(
        "import torch\n"
        "from ubp_fast.optim import RowSparseAdamW, RowSparseEmbedding, adopt_tables\n"
        "table = RowSparseEmbedding(5, 2)\n"
        "optimizer = adopt_tables(torch.optim.AdamW(table.parameters()), table, 'row_sparse')\n"
        "table(torch.tensor([1, 3])).sum().backward()\n"
        "optimizer.step()\n"
        "print(type(optimizer).__name__, int(table.touched.used))\n"
        "try:\n"
        "    from ubp_fast.optim import RowSparseRAdamScheduleFree\n"
        "except ImportError as error:\n"
        "    print(error.name)"
    )
    assert said.split() == ["RowSparseAdamW", "2", "schedulefree"]


def test_every_name_is_there() -> None:
    import ubp_fast.optim

    assert all(getattr(ubp_fast.optim, name) is not None for name in ubp_fast.optim.__all__)
