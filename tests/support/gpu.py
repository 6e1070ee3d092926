"""Where the tests of GPU kernels run: on a CUDA device, or in Triton's interpreter on the CPU (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

# UBP_PLAN=1 only counts the cases of a device where there is none.
HAS_GPU = torch.cuda.is_available() or os.environ.get("UBP_PLAN") == "1"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# The interpreter computes bfloat16 wrongly: its arithmetic takes the bits for those of another type.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if HAS_GPU else (torch.float32, torch.float16)


def require_triton_device() -> None:
    """Skips the module where Triton kernels can run neither on a device nor in the interpreter."""
    pytest.importorskip("triton", reason="needs Triton")
    if not (HAS_GPU or IS_INTERPRETED):
        pytest.skip("needs a CUDA device; test_triton.py runs it in the interpreter", allow_module_level=True)
