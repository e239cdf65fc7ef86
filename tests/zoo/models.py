"""All models of the zoo, from tables.

Columns of models.tsv: model, class, inputs (a name in calls.py), sizes, names of fields.tsv, and more fields. Later
fields take the place of earlier ones; None takes one out. Columns of timm.tsv: model, keyword arguments that make it
smaller, image size, another image size (0: none).
"""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn
from zoo import torchvision_models
from zoo.calls import CALLS, Inputs
from zoo.entry import Call, Entry

_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
#: Of timm: a gigabyte in float64.
_LARGE = ("timm/vgg11",)


def entries() -> dict[str, Entry]:
    """Name -> entry, by library and name."""
    found = {entry.name: entry for entry in (*torchvision_models.ENTRIES, *_of_timm(), *_of_hugging_face())}
    return dict(sorted(found.items()))


def named(patterns: Iterable[str]) -> dict[str, Entry]:
    """The entries whose name, or what follows the library's, fits one of these shell patterns; all without patterns."""
    every, chosen = entries(), dict[str, Entry]()
    for pattern in patterns:
        fitting = {n: e for n, e in every.items() if any(fnmatch.fnmatch(x, pattern) for x in (n, n.partition("/")[2]))}
        if not fitting:
            raise KeyError(f"{pattern}: no model of the zoo is called so")
        chosen |= fitting
    return dict(sorted(chosen.items())) or every


@cache
def _rows(name: str) -> list[list[str]]:
    return [line.split("\t") for line in Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()]


def fields(names: str, **more: Any) -> dict[str, Any]:
    """Fields of a configuration: those with these names in fields.tsv, and more."""
    shared = dict(_rows("fields.tsv"))
    found: dict[str, Any] = {}
    for name in names.split():
        found |= ast.literal_eval(shared[name])
    return {key: value for key, value in (found | more).items() if value is not None}


def builder(library: str, model: str, given: dict[str, Any]) -> Callable[[], nn.Module]:
    """Makes a model of transformers or diffusers from the fields of its configuration; imports the library late."""

    def build() -> nn.Module:
        made: type[Any] = getattr(import_module(library), model)
        own = deepcopy(given)  # configurations take from the dicts that they are given
        built: nn.Module = made(**own) if library == "diffusers" else made(made.config_class(**own))
        return built

    return build


def _of_hugging_face() -> Iterator[Entry]:
    """Models of transformers and diffusers."""
    for name, model, call, sizes, shared, more in _rows("models.tsv"):
        build = builder(name.partition("/")[0], model, fields(shared, **ast.literal_eval(more)))
        lengths, inputs = CALLS[call]

        def called(batch: int, size: int, lengths: tuple[int, int] = lengths, inputs: Inputs = inputs) -> Call:
            return (), inputs(batch, lengths[size])

        yield Entry(name, build, called, int(sizes), parameters=_EXPERTS if name.endswith("_experts") else ())


def _of_timm() -> Iterator[Entry]:
    """The smallest model of every timm family."""
    for model, kwargs, *sides in _rows("timm.tsv"):
        name, used = f"timm/{model}", tuple(int(side) for side in sides if int(side))

        def build(model: str = model, kwargs: str = kwargs) -> nn.Module:
            made: nn.Module = import_module("timm").create_model(model, **ast.literal_eval(kwargs))
            return made

        call = torchvision_models.images(used)
        yield Entry(name, build, call, sizes=len(used), double=name not in _LARGE)
