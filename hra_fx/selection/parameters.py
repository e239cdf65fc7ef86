"""Select 3-D parameters of a model with `target_parameters`, by the rule of PEFT's LoRA, and suggest other parameters.

In transformers 5, the experts of a layer are one module with parameters of shape `(experts, out, in)` or
`(experts, in, out)`. `target_modules` selects modules, so it never selects these parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from hra_fx.compat import require
from hra_fx.config import HRAConfig
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.experts_weight import CHILD, ExpertsWeight, is_transposed, stacked_parameters
from hra_fx.layers.target import SAVED
from hra_fx.selection.suggestions import available


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
    if not stacked and original_class(model).__module__.startswith("transformers."):
        require("`target_parameters` for the experts of a transformers model")
    for name in names:
        if not any(matches_parameter([name], known) for known in stacked):
            return f"`target_parameters`: {name!r} matches no 3-D parameter of the model. {available(stacked)}"
    for known, owner in stacked.items():
        if matches_parameter(names, known) and is_transposed(owner) is None:
            return (
                f"{known}: {type(owner).__name__} does not state whether its parameters are (experts, out, in) or "
                "(experts, in, out). Set the attribute `is_transposed` of the module to False or True."
            )
    return None


def expert_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Path -> (module, parameter), for the 3-D parameters of a model that are likely those of experts.

    Those with a dimension of size 1, such as position embeddings of shape `(1, n, d)`, are left out.
    """
    found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    for path, owner, name in stacked_parameters(model):
        parameter: Any = owner._parameters[name]
        if min(parameter.shape) > 1 and SAVED not in path.split("."):
            found[f"{path}.{name}".lstrip(".")] = owner, parameter
    return found


def parameters_hint(module: nn.Module, path: str = "", names: Collection[str] | None = None) -> str | None:
    """A suggestion if the module at a path has 3-D parameters, or some that match `names`; otherwise `None`."""
    inside = [f"{path}.{name}".lstrip(".") for name in expert_parameters(module)]
    found = [name for name in inside if names is None or matches_parameter(names, name)]
    if not found:
        return None
    # Without the names of blocks.
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in found))
    return f"`target_modules` does not select 3-D parameters. Use target_parameters={ends}."
