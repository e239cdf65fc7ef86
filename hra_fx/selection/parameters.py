"""Select the 3-D parameters that `target_parameters` names, with the matching rule of PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hra_fx.config import HRAConfig
from hra_fx.layers.experts_weight import CHILD, ExpertsWeight, is_transposed, stacked_parameters
from hra_fx.selection.suggestions import format_names, suggestion


def targeted_parameters(model: nn.Module, config: HRAConfig) -> dict[str, nn.Module]:
    """The 3-D parameters that `config` targets, each as the layer that stands for it: path -> layer.

    The path is that of the layer once it is adapted, `<path of the module>.hra_<parameter>`.

    >>> model = nn.ModuleDict({"experts": nn.Module()})
    >>> model["experts"].up = nn.Parameter(__import__("torch").ones(4, 8, 6))
    >>> list(targeted_parameters(model, HRAConfig(target_parameters=["experts.up"])))
    ['experts.hra_up']
    """
    found: dict[str, nn.Module] = {}
    names = config.target_parameters or ()
    for path, owner, name in stacked_parameters(model) if names else ():
        if matches_parameter(names, f"{path}.{name}".lstrip(".")):
            present = owner._modules.get(CHILD + name)
            found[f"{path}.{CHILD}{name}".lstrip(".")] = present or ExpertsWeight(owner, name)
    return found


def matches_parameter(names: Iterable[str], parameter: str) -> bool:
    """Whether one of the names is the path of a parameter, or the end of it after a dot.

    >>> matches_parameter(["experts.up"], "mlp.experts.up"), matches_parameter(["perts.up"], "mlp.experts.up")
    (True, False)
    """
    return any(parameter == name or parameter.endswith(f".{name}") for name in names)


def parameters_problem(model: nn.Module, config: HRAConfig) -> str | None:
    """What is wrong with the entries of `target_parameters` for a model, or `None`."""
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
            return (
                f"`target_parameters={format_names(names)}`: {type(model).__name__} has no 3-D parameters. Name its "
                "layers in `target_modules`."
            )
        return f"`target_parameters`: {name!r} matches no 3-D parameter. " + suggestion(
            [name], list(stacked), takes_str=False
        )
    unknown = {
        known: owner
        for known, owner in stacked.items()
        if matches_parameter(names, known) and is_transposed(owner) is None
    }
    if unknown:
        first, owner = next(iter(unknown.items()))
        return (
            f"{first}: {type(owner).__name__} does not say whether its parameters are (experts, out, in) or "
            "(experts, in, out). Set the attribute `is_transposed` of the module to False or True."
        )
    return None
