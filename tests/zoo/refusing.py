"""`transform` with every layer that can be named, and what it refused on the way."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence

from adapting import picture
from torch import nn

import hra_fx
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.target import find_kind

_MESSAGE = re.compile(
    r"(?P<path>\S+?)(?: \([\w.]+\))?: (?P<reason>.*?)(?: Also unsupported: (?P<also>.*)\.)?", re.DOTALL
)


def candidates(model: nn.Module, parameters: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Path -> layer of every kind that hra_fx takes; each layer once, and those of parameters with these names."""
    found = {path: module for path, module in model.named_modules() if path and find_kind(module)}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3 and f"{path}.{name}".endswith(tuple(parameters) or " "):
                found[f"{path}.hra_{name}"] = ExpertsWeight(module, name)
    return found


def config_for(paths: Collection[str]) -> hra_fx.HRAConfig:
    """Three reflections for exactly these layers: an odd rank, hence with an anchor."""
    experts = [path.replace(".hra_", ".") for path in paths if ".hra_" in path]
    layers = "|".join(re.escape(path) for path in paths if ".hra_" not in path)
    return hra_fx.HRAConfig(r=3, target_modules=layers, target_parameters=experts or None)


def transform_most(
    model: nn.Module, parameters: Sequence[str] = ()
) -> tuple[hra_fx.HRAConfig | None, dict[str, str], float]:
    """Transform a model with all its layers except the refused ones; a refusal must not change the model.

    Args:
        model: the model.
        parameters: ends of the names of 3-D parameters.

    Returns:
        The configuration that was accepted (`None`: all layers were refused), layer -> reason for its refusal, and the
        seconds of the last call.

    Raises:
        AssertionError: a refusal changed the model.
        HRAError: the model was refused without naming a layer.
    """
    left = candidates(model, parameters)
    refused: dict[str, str] = {}
    while left:
        before = state_of(model)
        config = config_for(left)
        begin = time.perf_counter()
        try:
            hra_fx.transform(model, config)
        except hra_fx.UnsupportedLayerError as error:
            changed = [key for key, value in state_of(model).items() if before[key] != value]
            assert not changed, f"a refused transform changed the model's {', '.join(changed)}"
            named = _named(str(error), left)
            if not named:
                raise
            refused |= named
            left = {path: layer for path, layer in left.items() if path not in named}
        else:
            return config, refused, time.perf_counter() - begin
    return None, refused, 0.0


def _named(message: str, left: dict[str, nn.Module]) -> dict[str, str]:
    """The layer that a message gives the reason for, and those of its class and name that it names besides."""
    match = _MESSAGE.fullmatch(message)
    if match is None or match["path"] not in left:
        return {}
    first = match["path"]
    others = [path for path in (match["also"] or "").split(", ") if path in left]
    alike = [
        path
        for path in others
        if type(left[path]) is type(left[first]) and path.rpartition(".")[2] == first.rpartition(".")[2]
    ]
    return dict.fromkeys([first, *alike], match["reason"])


def state_of(model: nn.Module) -> dict[str, object]:
    """All that `transform` could change, by identity, and how often buffers were written."""
    return picture(model) | {"buffers": [(name, id(b), b._version) for name, b in model.named_buffers()]}
