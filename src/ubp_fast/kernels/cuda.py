"""What the CUDA backends of all operators share: the compiled module, whether it can run, and how it is called.

The kernels are built where a CUDA compiler is found (`UBP_CUDA=AUTO`, the default), need no CUDA library beside the
driver, and run on devices of compute capability 8.0 and newer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ubp_fast.kernels.backends import MIN_CAPABILITY, capability, unsupported_dtype

module: ModuleType | None
MISSING = ""
try:
    module = importlib.import_module("ubp_fast._cuda")
except ImportError as error:
    module, MISSING = None, str(error)

ALIGNMENT_BYTES = 16


def unsupported(tensor: Tensor) -> str | None:
    """Why a problem with tensors like this one cannot run on the compiled CUDA kernels, or None."""
    if tensor.device.type != "cuda":
        return f"it computes on CUDA devices, the tensors are on {tensor.device}"
    if module is None:
        return f"this installation was built without the CUDA kernels ({MISSING}); install it where nvcc is found"
    if capability(tensor.device) < MIN_CAPABILITY:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(tensor.device)} is older"
    return unsupported_dtype(tensor)


def kernels() -> Any:
    """The compiled module, after `unsupported` has said None."""
    assert module is not None
    return module


def launch(function: Callable[..., None], tensor: Tensor, *arguments: Any) -> None:
    """Calls a compiled function with the stream that PyTorch uses on the tensor's device as last argument."""
    if not tensor.is_cuda:  # the emulation of the tests
        function(*arguments, 0)
        return
    with torch.cuda.device(tensor.device):
        function(*arguments, torch.cuda.current_stream().cuda_stream)


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, with rows (last dimension) that are whole multiples of 16 bytes, zeros added; a copy if needed."""
    missing = -tensor.shape[-1] % (ALIGNMENT_BYTES // tensor.element_size())
    tensor = functional.pad(tensor, (0, missing)) if missing else tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()
