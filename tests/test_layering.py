"""The dependency rule, read from the sources: a folder imports only from folders below it, files have no cycles."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import types
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Folder of the repository -> its import name. `hra_fx/passes` is a link to `passes`, so that a checkout, an editable
#: installation, type checkers and wheels all find the same package.
PACKAGES = {"hra_fx": "hra_fx", "passes": "hra_fx.passes"}
LAZY = "hra_fx"
#: From bottom to top. A folder imports from itself and from those before it; a name without a folder is a loose file.
ORDER = (
    "hra_fx.version",
    "hra_fx.removed",
    "hra_fx.errors",
    "hra_fx.compat",
    "hra_fx.atomic_write",
    "hra_fx.hub",
    "hra_fx.config_fields",
    "hra_fx.config",
    "hra_fx.example_inputs",
    "hra_fx.functional",
    "hra_fx.layers",
    "hra_fx.selection",
    "hra_fx.passes",
    "hra_fx.model",
    "hra_fx.training",
    "hra_fx.checkpoint",
    "hra_fx.lora",
    "hra_fx.export",
    "hra_fx.reporting",
    "hra_fx.view",
    "hra_fx.api",
    "hra_fx.cli",
    "hra_fx.__main__",
)
#: The rewrites of graphs know layers by name, the patterns of a configuration, and errors.
REWRITES = ("hra_fx.passes.match", "hra_fx.passes.insert", "hra_fx.passes.fold")
REWRITES_MAY_READ = (
    "hra_fx.config",
    "hra_fx.selection.select",
    "hra_fx.layers.target",
    "hra_fx.layers.experts_weight",
    "hra_fx.errors",
    "hra_fx.passes.reflection",
)
#: Slow imports, and PEFT, which is not a dependency: only what needs them imports them.
UNASKED = ("torch._dynamo", "transformers.trainer", "peft")
SHADOWED = ("transform", "fold", "report", "graphs")


def _module_name(file: Path) -> str:
    folder, *parts = file.relative_to(ROOT).with_suffix("").parts
    parts = [PACKAGES[folder], *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    _module_name(file): file
    for folder in PACKAGES
    for file in sorted((ROOT / folder).rglob("*.py"))
    if (ROOT / "hra_fx" / "passes") not in file.parents
}


@cache
def _imports(name: str) -> list[tuple[str, int]]:
    """Every file of ours that a file imports, anywhere in it, with the line."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{name}:{node.lineno}: imports are absolute"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target if target in FILES else node.module for target in targets]
        else:
            continue
        found += [(target, node.lineno) for target in targets if target.split(".")[0] == "hra_fx"]
    return found


def _graph() -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(FILES)
    # What the package hands on lazily is the users' way in; it takes part in no import.
    graph.add_edges_from((name, target) for name in FILES if name != LAZY for target, _ in _imports(name))
    return graph


def _folder(name: str) -> str:
    """The entry of `ORDER` that a module belongs to."""
    return ".".join(name.split(".")[:2])


def test_a_folder_imports_only_from_folders_below_it() -> None:
    """And no file imports through the lazy names of the package."""
    assert {_folder(name) for name in FILES if name != LAZY} == set(ORDER)
    wrong = [
        f"{name}:{line} imports {target}"
        for name in FILES
        if name != LAZY
        for target, line in _imports(name)
        if target == LAZY or ORDER.index(_folder(target)) > ORDER.index(_folder(name))
    ]
    assert not wrong


def test_no_file_imports_a_name_that_starts_with_an_underscore() -> None:
    private = [
        f"{name}: {node.module}.{alias.name}"
        for name, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "hra_fx"
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not private


def test_imports_between_files_are_acyclic() -> None:
    cycles = [" -> ".join([*cycle, cycle[0]]) for cycle in nx.simple_cycles(_graph(), length_bound=6)]
    assert nx.is_directed_acyclic_graph(_graph()), cycles


def test_no_file_imports_more_than_twelve_of_ours() -> None:
    graph = _graph()
    assert {name: count for name, count in graph.out_degree() if count > 12} == {}


def test_a_rewrite_knows_only_layers_by_name_patterns_and_errors() -> None:
    assert not [(name, to) for name in REWRITES for to, _ in _imports(name) if not to.startswith(REWRITES_MAY_READ)]


def test_imports_of_the_package_are_lazy() -> None:
    code = (
        "import sys, hra_fx\n"
        "assert 'torch' not in sys.modules, 'importing the package should cost nothing'\n"
        "hra_fx.transform, hra_fx.fold, hra_fx.graphs\n"
        f"for name in {UNASKED!r}: assert name not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_names_of_the_package_survive_the_import_of_every_submodule() -> None:
    import hra_fx

    for name in FILES:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    assert all(isinstance(getattr(hra_fx, name), types.FunctionType) for name in SHADOWED)
    assert all(callable(getattr(hra_fx, name)) for name in hra_fx.__all__)
    assert set(hra_fx.__all__) <= set(dir(hra_fx))
    with pytest.raises(AttributeError, match="no attribute 'transfrom'"):
        _ = hra_fx.transfrom
