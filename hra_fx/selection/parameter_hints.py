"""Weights that are parameters of a module and not layers: the experts of a mixture of experts.

In transformers 5, the experts of a layer are one module, with parameters of shape `(experts, out, in)` or
`(experts, in, out)`. `target_modules` names modules, so it never reaches them.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from hra_fx.layers.experts_weight import stacked_parameters
from hra_fx.layers.target import SAVED


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> parameter, for the 3-D parameters of a model that belong to no layer, a shared one once.

    Parameters with a dimension of size 1, such as position embeddings of shape `(1, n, d)`, are left out.

    Example:
        >>> import torch
        >>> experts = nn.Module()
        >>> experts.gate_up_proj = nn.Parameter(torch.zeros(4, 6, 3))
        >>> list(expert_parameters(nn.ModuleDict({"experts": experts, "conv": nn.Conv1d(2, 2, 3)})))
        ['experts.gate_up_proj']
    """
    found: dict[str, nn.Parameter] = {}
    for path, owner, name in stacked_parameters(model):
        parameter = owner._parameters[name]
        if parameter is not None and min(parameter.shape) > 1 and SAVED not in path.split("."):
            found[f"{path}.{name}".lstrip(".")] = parameter
    return {path: parameter for path, parameter in model.named_parameters() if path in found}


def owner_of(model: nn.Module, path: str) -> nn.Module:
    """The module that a parameter belongs to."""
    return model.get_submodule(path.rpartition(".")[0])


def hint_for(model: nn.Module, names: Collection[str]) -> str | None:
    """What to write instead of those `names` in `target_modules` that are the names of 3-D parameters, if any."""
    parameters = expert_parameters(model)
    found = {name: [path for path in parameters if f".{path}".endswith(f".{name}")] for name in sorted(names)}
    paths = [path for path in parameters if any(path in held for held in found.values())]
    if not paths:
        return None
    kind = type(owner_of(model, paths[0])).__name__
    named = " and ".join(repr(name) for name, held in found.items() if held)
    what = "is a 3-D parameter" if sum(map(bool, found.values())) == 1 else "are 3-D parameters"
    return (
        f"{named} {what} of {kind}, which `target_modules` does not reach. Use target_parameters={_short_names(paths)}."
    )


def hint_inside(module: nn.Module, path: str) -> str | None:
    """What to write instead of the path of a module that holds 3-D parameters."""
    inside = [f"{path}.{name}" for name in expert_parameters(module)]
    return f"Its weights are 3-D parameters. Use target_parameters={_short_names(inside)}." if inside else None


def _short_names(paths: list[str]) -> list[str]:
    """The last two components of each path: a name that does not depend on the block."""
    return list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))
