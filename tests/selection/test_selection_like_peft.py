"""Random configurations on five models: PEFT and hra_fx adapt the same layers, or refuse for the same reason.

`select` is compared with `peft.inject_adapter_in_model`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import peft
import pytest
import transformers
from diffusion_pipelines import unet
from hypothesis import HealthCheck, given, settings, strategies as st
from named_models import MAKERS, Nested, built, tiny_bert, tiny_llama
from peft.tuners.hra.layer import HRALayer
from peft.utils.error import NoMatchingPeftModuleError
from tiny import gpt2, t5
from torch import nn

import hra_fx
from hra_fx.errors import HRAWarning, SelectionError
from hra_fx.selection.select import select

Fields: TypeAlias = dict[str, Any]
EXAMPLES = 21
CONTAINERS = (nn.ModuleList, nn.ModuleDict)

NO_DEFAULT = "^`target_modules` must be set: \\w+ \\(model_type .* has no default"
#: PEFT's error and a part of its text; a name for the outcome; a regex for the error of hra_fx.
REFUSALS: list[tuple[type[Exception], str, str, str]] = [
    (NoMatchingPeftModuleError, "", "no layer", "^`target_modules=.*(is empty|matches no module of|none is left)"),
    (KeyError, "model_type", "no default", NO_DEFAULT),
    (ValueError, "Please specify `target_modules`", "no default", NO_DEFAULT),
    (TypeError, "only `torch.nn.Linear` and", "unsupported", "only nn.Linear, .* can be adapted"),
    (
        TypeError,
        "of type <class 'peft.tuners.hra",
        "saved too",
        "cannot be both adapted and saved in full|is no module 'no_",
    ),
]


def tiny_swin() -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, window_size=4))


# ---- configurations ----


def endings(paths: list[str]) -> st.SearchStrategy[str]:
    """Usually the last component of a path, sometimes more components."""
    cuts = st.sampled_from([1, 1, 1, 2, 3, 99])
    return st.tuples(st.sampled_from(paths), cuts).map(lambda drawn: ".".join(drawn[0].split(".")[-drawn[1] :]))


def wrong_names(paths: list[str]) -> st.SearchStrategy[str]:
    """Names that differ slightly from those of modules."""
    return st.tuples(endings(paths), st.sampled_from(["{}_", ".{}", "*{}", "nothing.{}"])).map(
        lambda drawn: drawn[1].format(drawn[0])
    )


def lists(layers: list[str], paths: list[str]) -> st.SearchStrategy[list[str]]:
    """Lists of names: usually of layers, sometimes of other modules or of none."""
    some = st.lists(endings(layers), min_size=1, max_size=4)
    mixed = st.tuples(some, st.lists(wrong_names(layers), max_size=2)).map(lambda drawn: [*drawn[0], *drawn[1]])
    anything = st.lists(endings(paths), min_size=1, max_size=2)
    return st.one_of(mixed, mixed, mixed, mixed, anything, st.lists(wrong_names(paths), max_size=2))


def regexes(layers: list[str], paths: list[str]) -> st.SearchStrategy[str]:
    leaf = st.sampled_from(sorted({path.rpartition(".")[2] for path in layers})).map(re.escape)
    part = st.sampled_from(sorted({part for path in paths for part in path.split(".")})).map(re.escape)
    forms = [r"(.*\.)?{1}", r".+\.{1}$", r"(?!.*\b{0}\b).*\.{1}", r".*\b{0}\..*{1}", r"(?i:.*\.1\..*{1})", "{1}"]
    return st.tuples(st.sampled_from(forms), part, leaf).map(lambda drawn: drawn[0].format(*drawn[1:]))


def savable(model: nn.Module) -> list[str]:
    """Names that do not match a container of modules, because PEFT cannot save containers."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    lists_of_modules = [path for path in paths if isinstance(model.get_submodule(path), CONTAINERS)]
    names = sorted({path.rpartition(".")[2] for path in paths if not any(model.get_submodule(path).children())})
    return [name for name in names if not any(path.endswith(name) for path in lists_of_modules)]


@st.composite
def configurations(draw: st.DrawFn, model: nn.Module) -> Fields:
    """Fields that both libraries accept, for the names of `model`."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    layers = [path for path in paths if isinstance(model.get_submodule(path), nn.Linear | nn.Conv2d)]
    names, patterns = lists(layers, paths), regexes(layers, paths)
    every = st.sampled_from(["all-linear", "ALL-Linear", None])
    fields: Fields = {"target_modules": draw(st.one_of(names, names, names, patterns, patterns, every))}
    if draw(st.booleans()):
        fields["exclude_modules"] = draw(st.one_of(names, patterns, st.lists(wrong_names(paths), max_size=1)))
    if not isinstance(fields["target_modules"], str) and draw(st.booleans()):
        numbered = sorted({path.split(".")[-2] for path in paths if re.search(r"\.\d+$", path)})
        index, name = st.sampled_from([0, 1, 1, 2, 10]), st.sampled_from(numbered)
        union = st.lists(name, min_size=2, max_size=3).map("|".join)
        block = st.one_of(name, name, union.map("(?:{})".format), union, st.just(r"\w+s"))
        fields["layers_to_transform"] = draw(st.one_of(index, st.lists(index, max_size=3)))
        fields["layers_pattern"] = draw(st.one_of(st.none(), block, st.lists(block, max_size=3), st.just("")))
    if draw(st.integers(0, 3)) == 3:
        saved = st.sampled_from(savable(model))
        fields["modules_to_save"] = draw(st.lists(saved | saved | saved.map("no_{}".format), max_size=2))
    fields["task_type"] = draw(st.sampled_from([None, "SEQ_CLS", "CAUSAL_LM"]))
    return fields


# ---- PEFT and hra_fx ----


def by_peft(model: nn.Module, fields: Fields) -> tuple[nn.Module | Exception, bool]:
    """A copy of `model` adapted by PEFT, or its error; and whether it warned that `exclude_modules` matches nothing."""
    model, config = copy.deepcopy(model), peft.HRAConfig(r=2, **fields)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            peft.inject_adapter_in_model(config, model)
        except (ValueError, TypeError, KeyError) as error:
            return error, False
    return model, any("no modules were excluded" in str(warning.message) for warning in caught)


def by_us(model: nn.Module, fields: Fields) -> tuple[list[str], bool]:
    """The layers that hra_fx selects; and whether it warned that `exclude_modules` matches nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = list(select(model, hra_fx.HRAConfig(r=1, **fields)))
    assert all(warning.category is HRAWarning for warning in caught), [str(warning.message) for warning in caught]
    return layers, any(str(warning.message).startswith("`exclude_modules=") for warning in caught)


def refusal(model: nn.Module, fields: Fields) -> str:
    """The error of hra_fx."""
    with pytest.raises(SelectionError) as caught:
        select(model, hra_fx.HRAConfig(r=1, **fields))
    return str(caught.value)


def adapted(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, HRALayer)]


def compare(model: nn.Module, fields: Fields) -> str:
    """Compare PEFT and hra_fx, and return the name of the outcome."""
    theirs, theirs_warned = by_peft(model, fields)
    if isinstance(theirs, Exception):
        kinds = [(name, ours) for kind, text, name, ours in REFUSALS if type(theirs) is kind and text in str(theirs)]
        assert len(kinds) == 1, repr(theirs)
        name, ours = kinds[0]
        said = refusal(model, fields)
        assert re.search(ours, said), (said, theirs)
        if name == "unsupported":
            first = type(model.get_submodule(said.partition("matches ")[2].partition(" (")[0])).__name__
            assert str(theirs).startswith(f"Target module {first}(")
        return name
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    if absent := [name for name in fields.get("modules_to_save", []) if not any(p.endswith(name) for p in paths)]:
        assert f"`modules_to_save`: no module is called {absent[0]!r}" in refusal(model, fields)
        return "nothing to save"
    layers, warned = by_us(model, fields)
    assert layers == adapted(theirs)
    # PEFT counts modules that modules_to_save excludes as excluded, so it warns in fewer cases.
    assert warned == theirs_warned or (warned and fields.get("modules_to_save"))
    return "adapted"


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, t5, tiny_swin, Nested])
def test_random_configurations(make: Callable[[], nn.Module]) -> None:
    model = built(make)
    seen = Counter[str]()

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(fields=configurations(model))
    def agree(fields: Fields) -> None:
        seen[compare(model, fields)] += 1

    agree()
    # The configurations must not be too odd, nor too plain.
    assert seen["adapted"] >= EXAMPLES / 5
    assert seen["no layer"] + seen["unsupported"] >= EXAMPLES / 14


@pytest.mark.parametrize(
    ("make", "fields", "outcome"),
    [
        (Nested, {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["x", "h"]}, "adapted"),
        (Nested, {"target_modules": r"st|.*\.w1"}, "adapted"),
        (Nested, {"target_modules": ["conv", "norm"]}, "unsupported"),
        (Nested, {"target_modules": ["w1"], "layers_to_transform": 3}, "no layer"),
        (Nested, {"target_modules": None}, "no default"),
        (unet, {"target_modules": None}, "no default"),
        (Nested, {"target_modules": ["sub_head"], "modules_to_save": ["head"]}, "saved too"),
        (Nested, {"target_modules": ["q"], "modules_to_save": ["no_head"]}, "nothing to save"),
    ],
)
def test_each_outcome(make: Callable[[], nn.Module], fields: Fields, outcome: str) -> None:
    assert compare(built(make), fields) == outcome


@pytest.mark.parametrize("make", [make for make in MAKERS if make is not gpt2])  # PEFT's HRA has no Conv1D
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_all_linear_and_defaults(make: Callable[[], nn.Module], task_type: str | None) -> None:
    model = built(make)
    for targets in ("all-linear", None):
        compare(model, {"target_modules": targets, "task_type": task_type})
