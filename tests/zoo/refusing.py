"""`transform` with every layer that can be named, and what it refused on the way."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from adapting import picture
from torch import nn

import hra_fx
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
                found[f"{path}.hra_{name}"] = module
    return found


def config_for(paths: Collection[str]) -> hra_fx.HRAConfig:
    """Two pairs of reflections for exactly these layers."""
    experts = [path.replace(".hra_", ".") for path in paths if ".hra_" in path]
    layers = "|".join(re.escape(path) for path in paths if ".hra_" not in path)
    return hra_fx.HRAConfig(r=4, target_modules=layers, target_parameters=experts or None)


def transform_most(model: nn.Module, parameters: Sequence[str] = ()) -> tuple[hra_fx.HRAConfig | None, dict[str, str]]:
    """Transform a model with all its layers except the refused ones; a refusal must not change the model.

    Returns the configuration that was accepted (`None`: all layers were refused), and layer -> reason for its refusal.
    """
    left = set(candidates(model, parameters))
    refused: dict[str, str] = {}
    while left:
        before = state_of(model)
        config = config_for(left)
        try:
            hra_fx.transform(model, config)
        except hra_fx.UnsupportedLayerError as error:
            changed = [key for key, value in state_of(model).items() if before[key] != value]
            assert not changed, f"a refused transform changed the model's {', '.join(changed)}"
            match = _MESSAGE.fullmatch(str(error))
            named = {match["path"], *(match["also"] or "").split(", ")} & left if match else None
            if not match or not named:
                raise
            refused |= dict.fromkeys(named, match["reason"])
            left -= named
        else:
            return config, refused
    return None, refused


def state_of(model: nn.Module) -> dict[str, object]:
    """All that `transform` could change, by identity, and how often buffers were written."""
    return picture(model) | {"buffers": [(name, id(b), b._version) for name, b in model.named_buffers()]}
