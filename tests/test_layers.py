"""Who may import whom (design of the house), read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "bdjax"
LAYERS = (
    {"errors", "types", "pair_types", "text"},
    {"registry", "protocols", "config", "io"},
    {"datasets", "models", "metrics", "hypergrad"},
    {"engine", "interop"},
    {"attacks", "defenses", "detectors"},
    {"bench", "pipelines", "vision_language"},
    {"reports"},
    {"api"},
    {"cli", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def imports(path: Path) -> set[str]:
    """Absolute names that a file imports, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts(path: Path) -> list[str]:
    return list(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_its_own_layer_or_below(path):
    own = parts(path)[0]
    for name in imports(path):
        if name.startswith("bdjax.") and (part := name.split(".")[1]) in LEVEL:
            assert LEVEL[part] <= LEVEL[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_method_imports_no_method(path):
    where = parts(path)
    kinds = ("attacks", "defenses", "detectors", "models", "datasets", "cli")
    if where[0] not in kinds or where[1].startswith("_") or len(where) > 2:
        return
    shared = {"defenses", "detectors"} if where[0] in ("defenses", "detectors") else {where[0]}
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "bdjax" and pieces[1] in ("attacks", "defenses", "detectors", where[0]) and len(pieces) > 2:
            assert pieces[1] in shared and pieces[2].startswith("_"), f"{where} imports {name}"


@pytest.mark.parametrize(
    ("package", "owner"),
    [("orbax", ["io"]), ("jaxopt", ["hypergrad"]), ("flax", ["models"])],
)
def test_one_importer_of(package, owner):
    users = {parts(p)[0] for p in FILES for name in imports(p) if name.split(".")[0] == package}
    assert users == set(owner)


def test_pmap_is_used_in_one_file():
    assert [parts(p) for p in FILES if "jax.pmap" in p.read_text()] == [["engine", "parallel"]]


def test_no_file_is_longer_than_its_budget():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_nothing_but_the_registry_looks_into_a_method_module():
    for path in FILES:
        if parts(path)[0] in ("protocols", "registry"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called, first = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
                assert called not in ("registry.load_module", "load_module"), f"{path}:{node.lineno}"
                probes = called in ("hasattr", "getattr", "inspect.signature") and first in ("module", "spec")
                assert not probes or parts(path)[:2] == ["pipelines", "experiment_options"], f"{path}:{node.lineno}"


def test_the_top_level_is_small():
    assert len([path for path in FILES if path.parent == ROOT]) + 1 <= 9  # with __init__.py, which FILES leaves out
