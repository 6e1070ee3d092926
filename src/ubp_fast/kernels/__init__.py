"""Kernels that are useful alone: each with one public function, one plain reference, and faster backends.

`backend="auto"` takes the first backend that supports the problem, in the order the operator's `api.py` writes down.
A named backend works or raises `BackendUnavailable` with its reason. Importing this package needs PyTorch and NumPy
only; what a backend needs beyond them is imported with its first use.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from ubp_fast.kernels.backends import BackendUnavailable
from ubp_fast.kernels.deferred import check_deferred
from ubp_fast.kernels.flash_attention import flash_attention
from ubp_fast.kernels.graphs import CapturedStep
from ubp_fast.kernels.nt_xent import NTXentLoss, nt_xent
from ubp_fast.kernels.windowed_aggregate import windowed_aggregate

__all__ = [
    "BackendUnavailable",
    "CapturedStep",
    "NTXentLoss",
    "check_deferred",
    "flash_attention",
    "nt_xent",
    "windowed_aggregate",
]


class _Package(ModuleType):
    """A package whose function has its name and hides it here: modules become attributes of the function, too.

    So `import ubp_fast.kernels.nt_xent._triton as triton` works beside `from ubp_fast.kernels import nt_xent`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType):
            setattr(getattr(self, self.__name__.rpartition(".")[2]), name, value)


for _function in (flash_attention, nt_xent, windowed_aggregate):
    _package = sys.modules[f"{__name__}.{_function.__name__}"]
    _package.__class__ = _Package
    vars(_function).update({name: part for name, part in vars(_package).items() if isinstance(part, ModuleType)})
