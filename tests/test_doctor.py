"""`ubp-fast doctor` tells of the machine, and finds a kernel that is wrong."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from torch import Tensor

from ubp_fast import _core, doctor
from ubp_fast.cli import main


def test_all_is_well_here(capsys: pytest.CaptureFixture[str]) -> None:
    before = _core.isa()
    assert main(["doctor"]) == 0
    assert _core.isa() == before
    told = capsys.readouterr().out
    assert told.endswith("all is well\n")
    for operator in ("flash_attention", "nt_xent", "row_sparse"):
        assert told.count(f"  {operator} ") >= len(_core.usable_isas())
    for topic in ("torch " + metadata.version("torch"), f"{_core.isa()} in use", "GiB", "windowed_aggregate", "GPU"):
        assert topic in told


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_a_wrong_kernel_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def problem(device: torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
        result = torch.ones(3, dtype=dtype)
        if backend == "native" and _core.isa() == _core.usable_isas()[-1]:
            if fault == "raises":
                raise RuntimeError("no such instruction")
            result[1] = 1.001 if fault == "wrong" else torch.nan
        return [result]

    monkeypatch.setattr(doctor, "PROBLEMS", {"nt_xent": (problem, (torch.float32,))})
    monkeypatch.setitem(doctor.PROBLEMS, "windowed_aggregate", (lambda *_: [torch.ones(2)], (torch.float64,)))
    assert doctor.run() == 1
    told = capsys.readouterr().out
    assert told.count("FAILED") == 1 and "1 of the checks failed" in told
    assert f"native {_core.usable_isas()[-1]}" in next(line for line in told.splitlines() if "FAILED" in line)


def test_a_backend_that_is_not_here_is_no_fault() -> None:
    found = doctor._check("nt_xent", "triton", torch.device("cpu"))
    assert not found.is_fault and "is unavailable: it computes on a CUDA device" in found.detail
