"""What the CUDA backends of all operators share: the compiled module, whether it can run, and how it is called.

The kernels are built where a CUDA compiler is found (`UBP_CUDA=AUTO`, the default), need no CUDA library beside the
driver, and run on devices of compute capability 8.0 and newer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

module: ModuleType | None
MISSING = ""
try:
    module = importlib.import_module("ubp_fast._cuda")
except ImportError as error:
    module, MISSING = None, str(error)

OLDEST_CAPABILITY = (8, 0)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ALIGNMENT_BYTES = 16


def unsupported(tensor: Tensor, dtypes: Collection[torch.dtype] = DTYPES) -> str | None:
    """Why a problem with tensors like this one cannot run on the compiled CUDA kernels, or None."""
    if tensor.device.type != "cuda":
        return f"it computes on CUDA devices, the tensors are on {tensor.device}"
    if module is None:
        return f"this installation was built without the CUDA kernels ({MISSING}); install it where nvcc is found"
    if torch.cuda.get_device_capability(tensor.device) < OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(tensor.device)} is older"
    if tensor.dtype not in dtypes:
        return f"it computes float32, bfloat16 and float16, the tensors are {tensor.dtype}"
    return None


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


def problem(kind: Callable[[], Any], **fields: Tensor | float | None) -> Any:
    """A struct of the compiled module with these fields: tensors go in as addresses, None as a null pointer."""
    made = kind()
    for name, value in fields.items():
        setattr(made, name, 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value)
    return made


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, with rows (last dimension) that are whole multiples of 16 bytes, zeros added; a copy if needed."""
    missing = -tensor.shape[-1] % (ALIGNMENT_BYTES // tensor.element_size())
    tensor = functional.pad(tensor, (0, missing)) if missing else tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()
