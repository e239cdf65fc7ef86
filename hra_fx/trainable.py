"""Which parameters an adapted model trains: PEFT's rules for `bias` and `modules_to_save`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from hra_fx.adapted import sites_of
from hra_fx.config import HRAConfig
from hra_fx.selection import saved_modules


@dataclass(frozen=True)
class Changes:
    """What `freeze` changed: parameter name -> `requires_grad` (before, after)."""

    flags: dict[str, tuple[bool, bool]]

    def restore(self, model: nn.Module) -> None:
        """Set back every flag that is still as `freeze` left it; one that somebody set since stays."""
        parameters = dict(model.named_parameters())
        for name, (before, after) in self.flags.items():
            if name in parameters and parameters[name].requires_grad is after:
                _set_flag(parameters[name], before)


def freeze(model: nn.Module, config: HRAConfig) -> Changes:
    """Leave only the reflections trainable, and what the configuration asks for besides.

    Biases: none, all in the model (`"all"`), or those of the adapted layers (`"hra_only"`). Modules in
    `modules_to_save` are trained in place. With `inference_mode` nothing is.
    """
    changes = Changes({})
    try:
        _set_flags(model, config, changes)
    except BaseException:
        changes.restore(model)
        raise
    return changes


def _set_flags(model: nn.Module, config: HRAConfig, changes: Changes) -> None:
    sites = sites_of(model)
    adapted = {f"{path}.bias" for path in sites}
    reflections = {id(parameter) for layer in sites.values() for parameter in layer.hra_u.parameters()}
    saved = {id(parameter) for module in saved_modules(model, config).values() for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        wanted = (
            id(parameter) in reflections
            or (config.bias == "all" and name.split(".")[-1] == "bias")
            or (config.bias == "hra_only" and name in adapted)
            or id(parameter) in saved
        ) and not config.inference_mode
        if parameter.requires_grad is not wanted and (parameter.is_floating_point() or not wanted):
            before = parameter.requires_grad
            _set_flag(parameter, wanted)
            changes.flags[name] = (before, wanted)


def _set_flag(parameter: nn.Parameter, wanted: bool) -> None:
    if is_lazy(parameter):  # allows no method before it is initialised
        parameter.requires_grad = wanted
    else:
        parameter.requires_grad_(wanted)
