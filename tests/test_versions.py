"""Supported versions: the pins that are tested, and private names of torch in one file."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import moe_models
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from torch import nn

import hra_fx
from hra_fx import compat

ROOT = Path(__file__).resolve().parent.parent
#: What cannot be installed next to the lowest torch.
NEED_A_NEWER_TORCH = ("executorch", "torchao")
#: Private attributes of torch's objects: they are read through `hra_fx.compat`.
ATTRIBUTES = {
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_is_replica",
    "_non_persistent_buffers_set",
    "_qkv_same_embed_dim",
    "_reversed_padding_repeated_twice",
    "_schema",
    "_version",
}


def requirements(*extras: str) -> list[Requirement]:
    """What hra_fx needs, with some extras, or all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [Requirement(text) for name in extras or optional for text in [*project["dependencies"], *optional[name]]]


def pins(file: str) -> dict[str, Version]:
    """Name -> version."""
    lines = (ROOT / "tests" / file).read_text(encoding="utf-8").splitlines()
    found = [text.split("==") for line in lines if (text := line.partition("#")[0].strip())]
    assert len({canonicalize_name(name) for name, _ in found}) == len(found) > 20, "no name twice"
    return {canonicalize_name(name): Version(version) for name, version in found}


def test_the_lowest_pins_are_the_lower_bounds() -> None:
    found = pins("lowest.txt")
    lowest = {
        canonicalize_name(need.name): Version(str(need.specifier).removeprefix(">=")) for need in requirements("test")
    }
    for newer in NEED_A_NEWER_TORCH:
        del lowest[newer]
    assert lowest.items() <= found.items() and found.keys() - lowest.keys() == {"pyarrow"}


def test_every_requirement_has_a_version_that_passed_the_tests() -> None:
    found = pins("constraints.txt")
    for need in requirements():
        assert need.specifier.contains(found[canonicalize_name(need.name)]), need
    assert not [name for name, version in found.items() if version.local], "builds of torch for CUDA and for CPUs fit"


def private_names(file: Path) -> Iterator[str]:
    """Where a file names something private of torch."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            names = [text] if text.startswith("torch.") and node.attr.startswith("_") else []
            names += [f"torch.{node.attr}"] if node.attr in ATTRIBUTES else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [f"torch.{node.value}"] if node.value in ATTRIBUTES else []  # of getattr
        private = [name for name in names if re.search(r"\._(?!_)", name) and name != "torch._assert"]  # documented
        yield from (f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {name}" for name in private)


def test_private_names_of_torch_are_in_compat_alone() -> None:
    files = [file for package in ("hra_fx", "passes") for file in (ROOT / package).rglob("*.py")]
    found = [name for file in files if file.name != "compat.py" for name in private_names(file)]
    assert not found, "\n".join(found)
    assert len(list(private_names(ROOT / "hra_fx" / "compat.py"))) > 5, "the scan finds them"


# ---- hra_fx.compat ----


class Counts(nn.Module):
    """torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if len(x.shape) == 2 else x


def counting() -> nn.Module:
    return hra_fx.transform(Counts(), hra_fx.HRAConfig(r=2, target_modules=["linear"]))


X = torch.ones(2, 3)
USES: dict[str, Callable[[], object]] = {
    "a graph captured by torch.export": lambda: hra_fx.graphs(counting(), example_inputs=X),
    "export_training_step": lambda: hra_fx.export_training_step(counting(), X, loss=torch.sum),
    "`target_parameters` for the experts of a transformers model": lambda: hra_fx.transform(
        moe_models.built("mixtral"), hra_fx.HRAConfig(r=2, target_parameters=["experts.down_proj"])
    ),
}


@pytest.mark.parametrize("feature", compat.NEWER)
def test_what_needs_a_newer_release_says_so(feature: str) -> None:
    library, release = compat.NEWER[feature]
    installed, use = importlib.metadata.version(library), USES[feature]
    if Version(installed) >= Version(release):
        use()
        return
    text = f"{feature} needs {library} {release} or later, and {installed} is installed. Run: "
    with pytest.raises(hra_fx.AdapterError, match=f"^{re.escape(text)}pip install "):
        use()
