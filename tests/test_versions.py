"""Supported versions: the pins that are tested, and private names of torch in one file."""

from __future__ import annotations

import ast
import copy
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from torch import nn
from torch.autograd import forward_ad

import hra_fx
from hra_fx import compat

ROOT = Path(__file__).resolve().parent.parent
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


def bounds() -> dict[str, str]:
    """Name -> lower bound, of what hra_fx and its tests need."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(rf"^{name} = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE) for name in ("dependencies", "test")]
    return dict(
        re.findall(r'^    "([\w-]+)>=([\d.]+?)(?:\.0)*",$', "".join(found[1] for found in lists if found), re.MULTILINE)
    )


def test_the_lowest_pins_are_the_lower_bounds() -> None:
    text = (ROOT / "tests/lowest.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^([\w-]+)==([\d.]+?)(?:\.0)*$", text, re.MULTILINE)
    assert len(pins) > 20
    assert dict(pins) == bounds()


def requirements() -> Iterator[Requirement]:
    """What hra_fx needs, with all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for texts in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from map(Requirement, texts)


def constraints() -> dict[str, Version]:
    """Name -> version, of tests/constraints.txt."""
    lines = (ROOT / "tests/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    assert len({canonicalize_name(name) for name, _ in pins}) == len(pins), "no name twice"
    return {canonicalize_name(name): Version(version) for name, version in pins}


def test_every_requirement_has_a_version_that_passed_the_tests() -> None:
    pins = constraints()
    for need in requirements():
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), need
    assert not [name for name, version in pins.items() if version.local], "builds of torch for CUDA and for CPUs fit"


def installs(*settings: str) -> list[list[str]]:
    """The arguments of each `pip install` that make would run for its environment, if there were none."""
    goals = ("check", "test-all", "demo", "docs")
    printed = subprocess.run(
        ["make", "--dry-run", "VENV=none", *settings, *goals],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": True},
        env={name: value for name, value in os.environ.items() if name not in ("CONSTRAINTS", "MAKEFLAGS")},
    ).stdout
    return [call.split() for call in re.findall(r"-m pip .* install (.*?)(?: &&.*)?$", printed, re.MULTILINE)]


def test_make_installs_releases_that_passed_the_tests() -> None:
    pins, calls = constraints(), installs()
    assert len(calls) == 5
    for call in calls:
        assert call[:2] == ["--constraint", "tests/constraints.txt"]
    named = {word for call in calls for word in call if re.fullmatch(r"[a-z][\w-]*", word)}
    assert {"deepspeed", "mlxtend"} < named <= pins.keys()
    assert not any("--constraint" in call for call in installs("CONSTRAINTS="))


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


# ---- what the functions say ----


def test_what_is_active_around_a_call() -> None:
    seen: list[tuple[bool, ...]] = []

    def look() -> tuple[bool, ...]:
        asked = (
            compat.is_fx_tracing,
            compat.is_torchscript_tracing,
            compat.is_functorch_active,
            compat.is_dispatch_mode_active,
            compat.is_forward_ad_active,
        )
        return tuple(bool(ask()) for ask in asked)

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(look())
            return x * 2

    torch.fx.symbolic_trace(Looks())
    torch.jit.trace(Looks(), torch.ones(2), check_trace=False)
    torch.func.vmap(Looks())(torch.ones(2))
    with compat.fake_tensor_mode():
        Looks()(torch.ones(2))
    with forward_ad.dual_level():
        Looks()(torch.ones(2))
    assert [answers.index(True) for answers in seen if sum(answers) == 1] == list(range(5))
    assert not any(look())


def test_hooks_of_a_module_and_of_all_modules() -> None:
    layer = nn.Linear(2, 2)
    assert not compat.has_hooks(layer)
    with layer.register_forward_pre_hook(lambda *_: None):
        assert compat.has_hooks(layer) and not compat.has_global_module_hooks()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert compat.has_hooks(layer) and compat.has_global_module_hooks()
    assert not compat.has_hooks(layer)


@pytest.mark.parametrize("padding", [0, (1, 2), "valid", "same"])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 3)])
def test_the_border_of_a_convolution_is_that_of_torch(padding: object, kernel: tuple[int, int]) -> None:
    conv = nn.Conv2d(2, 2, kernel, padding=padding, dilation=(1, 2))  # type: ignore[arg-type]
    assert compat.conv_border(conv) == list(conv._reversed_padding_repeated_twice)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_padding_that_has_changed_is_the_one_that_torch_uses(mode: str) -> None:
    """torch reads `padding` for zeros, and the list that it made at first for other modes."""
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode=mode).double()
    conv.stride, conv.padding, conv.dilation = (1, 1), (2, 2), (2, 2)
    model = hra_fx.transform(nn.Sequential(conv), hra_fx.HRAConfig(r=4, target_modules=["0"], init_weights=False))
    for size in (6, 12, 40):  # few and many patches
        x = torch.randn(1, 3, size, size, dtype=torch.float64)
        folded = hra_fx.fold(copy.deepcopy(model))
        torch.testing.assert_close(model(x), folded(x))


def test_a_version_counts_writes() -> None:
    tensor = torch.zeros(3)
    before = compat.tensor_version(tensor)
    assert compat.tensor_version(tensor) == before
    assert compat.tensor_version(tensor.add_(1)) != before
    with torch.inference_mode():
        assert compat.tensor_version(torch.zeros(2)) == -1


def test_buffers_outside_of_the_state_and_compiled_modules() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("cached", torch.zeros(1), persistent=False)
    assert compat.non_persistent_buffers(module) == {"cached"}
    assert compat.is_compiled_module(torch.compile(module))  # type: ignore[arg-type]
    assert not compat.is_compiled_module(module)
