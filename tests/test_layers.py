"""Imports go one way; each room keeps to what it may know."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mlx_medphi"
MODULES = sorted(PACKAGE.rglob("*.py"))

BOTTOM = {"errors", "files", "config", "blas", "validation"}
# What a room or a single file at the top may import of the project; itself is always allowed.
MAY_IMPORT = {
    "errors": set(),
    "blas": set(),
    "files": {"errors"},
    "validation": {"errors"},
    "config": {"errors", "validation"},
    "data": BOTTOM,
    "text": BOTTOM | {"data"},
    "model": BOTTOM | {"data", "text"},
    "training": BOTTOM | {"data", "text", "model"},
    "evaluation": BOTTOM | {"data", "text", "model"},
    "coreml": BOTTOM | {"data", "text", "model"},
    "machine": BOTTOM,
    "demo": BOTTOM | {"data", "text", "model", "training", "coreml"},
    # The public face, which imports only when a name is asked for.
    "__init__": BOTTOM | {"data", "text", "model", "training", "evaluation", "coreml"},
    "cli": BOTTOM
    | {"__init__", "data", "text", "model", "training", "evaluation", "coreml"}
    | {"demo", "machine"},
    "__main__": {"cli"},
}
# Which rooms may load a library that is heavy or that shows things to people.
MAY_LOAD = {
    "mlx": {"model", "training", "evaluation", "coreml", "demo", "machine"},
    "mlx_lm": {"model", "training"},
    "tokenizers": {"text"},
    "transformers": set(),
    "torch": set(),
    "coremltools": {"coreml"},
    "typer": {"cli"},
    "rich": {"cli"},
}
MODULE_LINES = 400
FUNCTION_LINES = 50


def name_of(path: Path) -> str:
    parts = ["mlx_medphi", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module a file imports, inside functions and type-checking blocks too, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner in NAMES or alias.name == "__version__"
                yield (inner if is_module else node.module), node.lineno


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    # The version is all that anyone may take from the public face, which imports on demand.
    for name, line in imported(path):
        if name.split(".")[0] == "mlx_medphi" and name != "mlx_medphi.__version__":
            yield name, line


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(name_of(path))
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for name, line in own_imports(path)
        if room_of(name) not in MAY_IMPORT[room] | {room}
    ]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    room = room_of(name_of(path))
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for name, line in imported(path)
        if room not in MAY_LOAD.get(name.split(".")[0], {room})
    ]
    assert not wrong


def test_imports_form_no_cycle() -> None:
    # The public face imports on demand, so it stands outside.
    graph = {
        name_of(path): {name for name, _ in own_imports(path)} - {"mlx_medphi", name_of(path)}
        for path in MODULES
        if name_of(path) != "mlx_medphi"
    }
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=name_of)
def test_a_room_init_holds_one_docstring(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MODULE_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lines = {node.name: body_lines(node) for node in functions}
    assert {name: count for name, count in lines.items() if count > FUNCTION_LINES} == {}


def body_lines(function: ast.FunctionDef) -> int:
    """Lines below signature and docstring: a verb's options and a text for people are no logic."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_every_dependency_is_declared() -> None:
    # Name on the package index -> name of the module.
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("\ndependencies = [", 1)[1].split("]\n", 1)[0]
    declared = {"huggingface_hub", "mlx_lm", "rouge_score"} | {
        word.strip(' ",').split(">")[0].split("[")[0] for word in block.splitlines()
    }
    modules = {"pyyaml": "yaml"}
    declared = {modules.get(name, name) for name in declared}
    used = {name.split(".")[0] for path in MODULES for name, _ in imported(path)}
    assert used - set(sys.stdlib_module_names) - {"mlx_medphi"} <= declared
