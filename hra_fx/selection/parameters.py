"""Select 3-D parameters of a model with `target_parameters`, by the rule of PEFT's LoRA, and suggest other parameters.

In transformers 5, the experts of a layer are one module with parameters of shape `(experts, out, in)` or
`(experts, in, out)`. `target_modules` selects modules, so it never selects these parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from hra_fx.compat import require
from hra_fx.config import HRAConfig
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.experts_weight import CHILD, ExpertsWeight, is_transposed, stacked_parameters
from hra_fx.layers.target import SAVED
from hra_fx.selection.suggestions import format_names, suggestion


def targeted_parameters(model: nn.Module, config: HRAConfig) -> dict[str, nn.Module]:
    """The 3-D parameters that `config` targets: path -> layer that represents the parameter.

    The path is the path of the adapted layer, `<path of the module>.hra_<parameter>`.
    """
    found: dict[str, nn.Module] = {}
    names = config.target_parameters or ()
    for path, owner, name in stacked_parameters(model) if names else ():
        if matches_parameter(names, f"{path}.{name}".lstrip(".")):
            present = owner._modules.get(CHILD + name)
            found[f"{path}.{CHILD}{name}".lstrip(".")] = present or ExpertsWeight(owner, name)
    return found


def matches_parameter(names: Iterable[str], parameter: str) -> bool:
    """Whether one of the names is the path of a parameter, or the end of the path after a dot.

    >>> matches_parameter(["experts.up"], "mlp.experts.up"), matches_parameter(["perts.up"], "mlp.experts.up")
    (True, False)
    """
    return any(parameter == name or parameter.endswith(f".{name}") for name in names)


def parameters_problem(model: nn.Module, config: HRAConfig) -> str | None:
    """The error message for entries of `target_parameters` that do not fit a model, or `None`."""
    names = config.target_parameters or ()
    if not names:
        return None
    stacked = {f"{path}.{name}".lstrip("."): owner for path, owner, name in stacked_parameters(model)}
    others = {name: parameter for name, parameter in model.named_parameters() if name not in stacked}
    for name in names:
        if any(matches_parameter([name], known) for known in stacked):
            continue
        if other := next((known for known in others if matches_parameter([name], known)), None):
            return (
                f"{other}: `target_parameters` matches this parameter of shape {tuple(others[other].shape)}, but only "
                "parameters of experts, (experts, out, in) or (experts, in, out), can be adapted. Name its module in "
                "`target_modules` instead."
            )
        if not stacked:
            if original_class(model).__module__.startswith("transformers."):
                require("`target_parameters` for the experts of a transformers model")
            return (
                f"`target_parameters={format_names(names)}`: {type(model).__name__} has no 3-D parameters. List its "
                "layers in `target_modules`."
            )
        return f"`target_parameters`: {name!r} matches no 3-D parameter. " + suggestion(
            [name], list(stacked), takes_str=False
        )
    for known, owner in stacked.items():
        if matches_parameter(names, known) and is_transposed(owner) is None:
            return (
                f"{known}: {type(owner).__name__} does not state whether its parameters are (experts, out, in) or "
                "(experts, in, out). Set the attribute `is_transposed` of the module to False or True."
            )
    return None


def expert_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Path -> (module, parameter), for 3-D parameters of a model that do not belong to a layer; shared ones occur once.

    Parameters with a dimension of size 1, such as position embeddings of shape `(1, n, d)`, are left out.
    """
    found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    for path, owner, name in stacked_parameters(model):
        parameter = owner._parameters[name]
        if parameter is not None and min(parameter.shape) > 1 and SAVED not in path.split("."):
            found[f"{path}.{name}".lstrip(".")] = owner, parameter
    return {path: found[path] for path, _ in model.named_parameters() if path in found}


def hint_for(model: nn.Module, names: Collection[str]) -> str | None:
    """A suggestion if some `names` in `target_modules` are names of 3-D parameters; otherwise `None`."""
    parameters = expert_parameters(model)
    found = {name: [path for path in parameters if matches_parameter([name], path)] for name in sorted(names)}
    paths = [path for path in parameters if any(path in held for held in found.values())]
    if not paths:
        return None
    named, class_name = ", ".join(filter(found.get, found)), type(parameters[paths[0]][0]).__name__
    return (
        f"`target_modules` does not select 3-D parameters of {class_name} ({named}). "
        f"Use target_parameters={_short_names(paths)}."
    )


def hint_inside(module: nn.Module, path: str) -> str | None:
    """A suggestion for a module path in `target_modules` if the module has 3-D parameters; otherwise `None`."""
    inside = [f"{path}.{name}" for name in expert_parameters(module)]
    return f"Its weights are 3-D parameters. Use target_parameters={_short_names(inside)}." if inside else None


def _short_names(paths: list[str]) -> list[str]:
    """The last two components of each path: a name that does not depend on the block."""
    return list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))
