"""The dependency rule, read from the sources: a folder imports only from folders below it, files have no cycles."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hra_fx", "passes")
LAZY = "hra_fx"
#: From bottom to top. A folder imports from itself and from those before it; a name without a folder is a loose file.
ORDER = (
    "hra_fx.version",
    "hra_fx.errors",
    "hra_fx.compat",
    "hra_fx.field_hints",
    "hra_fx.hub",
    "hra_fx.patterns",
    "hra_fx.config",
    "hra_fx.atomic_write",
    "hra_fx.functional",
    "hra_fx.kernels",
    "hra_fx.layers",
    "hra_fx.selection",
    "passes",
    "hra_fx.model",
    "hra_fx.tracing",
    "hra_fx.checkpoint",
    "hra_fx.lora",
    "hra_fx.export",
    "hra_fx.reporting",
    "hra_fx.view",
    "hra_fx.integrations",
    "hra_fx.api",
    "hra_fx.cli",
    "hra_fx.__main__",
)
MOST_LOOSE_FILES = 10
PASSES_MAY_READ = ("hra_fx.layers.target", "hra_fx.errors", "hra_fx.compat", "passes")
#: Slow imports, and PEFT, which is not a dependency: only what needs them imports them.
UNASKED = ("torch._dynamo", "transformers.trainer", "peft")
SHADOWED = ("transform", "fold", "report", "graphs")


def _module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module_name(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}


def _absolute(name: str, node: ast.ImportFrom) -> str:
    """The module that a `from ... import` names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *(node.module or "").split(".")]).rstrip(".")


@cache
def _imports(name: str) -> list[tuple[str, int]]:
    """Every file of ours that a file imports, anywhere in it, with the line."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(name, node)
            targets = [f"{module}.{alias.name}" for alias in node.names]
            targets = [target if target in FILES else module for target in targets]
        else:
            continue
        found += [(target, node.lineno) for target in targets if target.split(".")[0] in PACKAGES]
    return found


def _graph() -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(FILES)
    # What the package hands on lazily is the users' way in; it takes part in no import.
    graph.add_edges_from((name, target) for name in FILES if name != LAZY for target, _ in _imports(name))
    return graph


def _folder(name: str) -> str:
    """The entry of `ORDER` that a module belongs to."""
    return name.split(".")[0] if name.startswith("passes") else ".".join(name.split(".")[:2])


def test_all_imports_are_found() -> None:
    graph = _graph()
    assert len(FILES) > 30
    assert graph.has_edge("hra_fx.model.graph_module", "passes.insert")
    assert graph.has_edge("hra_fx.layers.adapters", "hra_fx.functional.householder"), "`from ... import householder`"
    assert graph.has_edge("passes.fold", "hra_fx.layers.target")


def test_a_folder_imports_only_from_folders_below_it() -> None:
    upward = [
        f"{name}:{line} imports {target}"
        for name in FILES
        if name != LAZY
        for target, line in _imports(name)
        if target != LAZY and ORDER.index(_folder(target)) > ORDER.index(_folder(name))
    ]
    assert not upward


def test_every_folder_has_its_place() -> None:
    assert {_folder(name) for name in FILES if name != LAZY} == set(ORDER)


def test_few_files_are_loose() -> None:
    assert len(list((ROOT / "hra_fx").glob("*.py"))) <= MOST_LOOSE_FILES


def test_every_import_of_ours_is_a_file() -> None:
    unknown = {(name, target) for name in FILES for target, _ in _imports(name) if target not in FILES}
    assert not unknown


def test_imports_between_files_are_acyclic() -> None:
    cycles = [" -> ".join([*cycle, cycle[0]]) for cycle in nx.simple_cycles(_graph(), length_bound=6)]
    assert nx.is_directed_acyclic_graph(_graph()), cycles


def test_no_file_imports_through_the_lazy_names() -> None:
    found = [
        f"{FILES[name].name}:{line}"
        for name in FILES
        if name != LAZY
        for target, line in _imports(name)
        if target == LAZY
    ]
    assert not found, "import the name from its own file"


def test_no_file_imports_a_name_that_starts_with_an_underscore() -> None:
    private = []
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and _absolute(name, node).split(".")[0] in PACKAGES:
                private += [f"{name}: {alias.name}" for alias in node.names if alias.name.startswith("_")]
    assert not private


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("passes.")])
def test_a_pass_knows_only_layers_by_name_and_errors(name: str) -> None:
    assert all(target.startswith(PASSES_MAY_READ) for target, _ in _imports(name))


def test_no_file_of_the_package_is_named_as_a_public_function() -> None:
    import hra_fx

    public = {name for name in hra_fx.__all__ if callable(getattr(hra_fx, name))}
    assert set(SHADOWED) <= public
    assert not {f"hra_fx.{name}" for name in public} & FILES.keys()


def _run_in_fresh_interpreter(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_passes_can_be_imported_first() -> None:
    _run_in_fresh_interpreter("import passes.fold; import hra_fx; hra_fx.fold")


def test_imports_of_the_package_are_lazy_and_its_names_survive_the_import_of_every_submodule() -> None:
    """In one process, from nothing to everything: each process more would take seconds."""
    names = [name for name in FILES if not name.endswith("__main__")]
    _run_in_fresh_interpreter(
        "import importlib, sys, types, hra_fx\n"
        "assert 'torch' not in sys.modules, 'importing the package should cost nothing'\n"
        "hra_fx.transform, hra_fx.fold, hra_fx.graphs, hra_fx.accelerate_peft\n"
        f"for name in {UNASKED!r}: assert name not in sys.modules, name\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"for name in {SHADOWED!r}: assert isinstance(getattr(hra_fx, name), types.FunctionType), name\n"
        "for name in hra_fx.__all__: assert callable(getattr(hra_fx, name)), name\n"
        "assert set(hra_fx.__all__) <= set(dir(hra_fx))\n"
    )


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import hra_fx

    with pytest.raises(AttributeError, match="no attribute 'transfrom'"):
        _ = hra_fx.transfrom
