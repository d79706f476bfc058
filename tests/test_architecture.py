"""Which part may know which: read from the imports of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "vlmflow").rglob("*.py"))
DOORS_TO_KFP = {"vlmflow/local_worker.py", "vlmflow/compiler.py", "vlmflow/client.py", "vlmflow/kfp_api.py"}
REFUSED = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "torchvision"}


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """Dotted names of all absolute imports of a file, or of those outside of functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f) if n is not f}
    for node in ast.walk(tree):
        if top_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def heads(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_knows_neither_kubeflow_nor_who_uses_it(path: Path) -> None:
    found = heads(imports(path))
    assert not found & {"components", "pipelines", "services"}
    assert not found & REFUSED
    assert "kfp" not in found or name_of(path) in DOORS_TO_KFP
    assert "kfp" not in heads(imports(path, top_only=True))


def test_components_ship_their_bodies_so_the_library_is_imported_inside() -> None:
    for path in (ROOT / "components").glob("*.py"):
        assert heads(imports(path, top_only=True)) <= {"kfp", "components"}, path.name
        assert heads(imports(path)) <= {"kfp", "components", "vlmflow"}, path.name


def test_pipelines_only_chain_components() -> None:
    for path in (ROOT / "pipelines").glob("*.py"):
        assert heads(imports(path)) <= {"kfp", "components", "pipelines", "functools"}, path.name


def test_nothing_unpickles() -> None:
    """Weights and arrays come from stores that others may write."""
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                safe = given.get("weights_only") == "True" or given.get("allow_pickle") == "False"
                assert safe, f"{name_of(path)}:{node.lineno}"
