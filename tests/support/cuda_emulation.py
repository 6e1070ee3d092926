"""The CUDA kernels compiled for the host: the same sources, with an emulation in place of `csrc/common/device.h`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "kernels" / "cuda_emulation"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(directory: Path, sanitize: str = "") -> Path:
    """Compiles kernels, bindings and the emulation's self-check into one extension module named `_cuda`."""
    sources = [*sorted(ROOT.glob("csrc/*/*.cu")), ROOT / "csrc" / "cuda_bindings.cpp", EMULATION / "self_check.cpp"]
    includes = (EMULATION, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"])
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer"]

    def compile_one(source: Path) -> Path:
        target = directory / f"{source.parent.name}_{source.stem}.o"
        run([str(compiler()), *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = directory / "_cuda.so"
    run([str(compiler()), *flags, "-shared", *map(str, objects), "-o", str(library)])
    return library


def run(command: list[str]) -> None:
    """Raises with what the compiler said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load(library: Path) -> ModuleType:
    """The extension module at a path."""
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
