"""Find layers and 3-D parameters without an adapter, and the reasons, which come from the rules of the selection."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from hra_fx.compat import state_modules
from hra_fx.config import HRAConfig
from hra_fx.layers.experts_weight import CHILD
from hra_fx.layers.target import ADAPTER_CHILDREN, describe, find_kind, weight_name
from hra_fx.model.state import adapted_layers, get_state
from hra_fx.selection.parameters import expert_parameters
from hra_fx.selection.select import is_target, resolve_targets, saved_modules
from hra_fx.selection.suggestions import format_names


@dataclass(frozen=True)
class SkippedLayer:
    """A layer, or a 3-D parameter of experts, that could have an adapter but does not have one.

    Attributes:
        path: qualified name of the layer.
        layer_type: class and shape of the layer; for a parameter, the class of its module, and its shape.
        reason: why it does not have an adapter.
        targeted: whether the configuration of an adapter selects it, so that it should have an adapter.
    """

    path: str
    layer_type: str
    reason: str
    targeted: bool = False


#: The reason for layers whose adapters' configuration is not known.
_OUTSIDE = "outside of a transformed model, or in a part of one"


def not_adapted(model: nn.Module) -> tuple[tuple[SkippedLayer, ...], tuple[str, ...]]:
    """The layers of a model without an adapter, in model order, then its 3-D parameters without one.

    A layer with several paths is listed once.

    Args:
        model: a transformed model, a module that contains one, or a part of one (then the reasons are unknown).

    Returns:
        The skipped layers, and the paths of layers that are trained in full because of `modules_to_save`, or because
        their weight requires gradients (a new head).
    """
    adapted = set(adapted_layers(model).values())
    selections = {
        path: [Selection(part, config) for config in state.configs.values()]
        for path, part in state_modules(model)
        if (state := get_state(part)) is not None
    }
    skipped, trained = [], []
    for path, layer in state_modules(model):
        kind = find_kind(layer)
        if layer in adapted or not path or not ADAPTER_CHILDREN.isdisjoint(path.split(".")):
            continue
        root = next((root for root in selections if not root or path.startswith(f"{root}.")), "")
        inside, below = selections.get(root, []), path[len(root) :].lstrip(".")
        targeted = any(selection.selects(below) for selection in inside)
        in_full = bool(layer._parameters) and any(layer in selection.saved for selection in inside)
        weight = layer._parameters.get(weight_name(kind)) if kind else None
        if in_full or (not targeted and weight is not None and weight.requires_grad):
            trained.append(path)
        elif kind:
            reasons = dict.fromkeys(selection.reason(below) for selection in inside)
            skipped.append(SkippedLayer(path, describe(layer), "; ".join(reasons) or _OUTSIDE, targeted))
    for path, (owner, parameter) in expert_parameters(model).items():
        if not parameter.requires_grad and CHILD + path.rpartition(".")[2] not in owner._modules:
            name = ".".join(path.split(".")[-2:])
            kind_and_shape = f"{type(owner).__name__} {'x'.join(map(str, parameter.shape))}"
            skipped.append(SkippedLayer(path, kind_and_shape, f"a 3-D parameter: use target_parameters=[{name!r}]"))
    return tuple(skipped), tuple(trained)


class Selection:
    """The layers that an adapter's configuration selects in a model, and the reasons for the other layers.

    `saved` are the modules in `modules_to_save`, of any type, and all modules in them.
    """

    def __init__(self, model: nn.Module, config: HRAConfig) -> None:
        """Resolve "all-linear" or the default targets for a model."""
        self.config = config
        self.targets = resolve_targets(model, config)
        self.saved = {part for saved in saved_modules(model, config).values() for part in saved.modules()}
        self._unrestricted = replace(
            config, exclude_modules=None, modules_to_save=None, layers_to_transform=None, layers_pattern=None
        )

    def selects(self, path: str) -> bool:
        """Whether the layer with this path should have an adapter."""
        return is_target(self.config, path, self.targets)

    def reason(self, path: str) -> str:
        """Return the reason why this adapter is not on the layer with this path."""
        if self.selects(path):
            return "folded or replaced after transform"
        if not is_target(self._unrestricted, path, self.targets):
            targets = self.targets if self.config.target_modules is None else self.config.target_modules
            return f"not in target_modules={format_names(targets)}"
        for field in ("exclude_modules", "modules_to_save"):
            value = getattr(self.config, field)
            if not is_target(replace(self._unrestricted, **{field: value}), path, self.targets):
                return f"left out by {field}={format_names(value)}"
        return f"left out by layers_to_transform={format_names(self.config.layers_to_transform)}"
