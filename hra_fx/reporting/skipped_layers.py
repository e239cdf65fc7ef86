"""Find layers and 3-D parameters without an adapter, and the reasons, which come from the rules of the selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from hra_fx.compat import state_modules
from hra_fx.config import HRAConfig
from hra_fx.layers.experts_weight import CHILD
from hra_fx.layers.target import ADAPTER_CHILDREN, LayerKind, describe, find_kind, weight_name
from hra_fx.model.state import adapted_layers, collect_parts, get_state
from hra_fx.selection.parameters import expert_parameters
from hra_fx.selection.select import is_target, layer_index, resolve_targets, saved_modules
from hra_fx.selection.suggestions import format_names


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that could have an adapter but does not have one.

    Attributes:
        path: qualified name of the layer.
        layer_type: class and shape of the layer.
        reason: why it does not have an adapter.
        targeted: whether the configuration of an adapter selects it, so that it should have an adapter.
    """

    path: str
    layer_type: str
    reason: str
    targeted: bool = False


@dataclass(frozen=True)
class SkippedParameter:
    """A 3-D parameter, such as the weights of experts, that does not have an adapter and is not trained.

    Attributes:
        path: qualified name of the parameter.
        owner_type: class of the module that it belongs to.
        shape: its shape, usually `(experts, out, in)` or `(experts, in, out)`.
        share: its share of the parameters of the base model, from 0 to 1.
    """

    path: str
    owner_type: str
    shape: tuple[int, ...]
    share: float


def not_adapted(model: nn.Module) -> tuple[tuple[SkippedLayer, ...], tuple[str, ...]]:
    """The layers of a model without an adapter, in model order. A layer with several paths is listed once.

    Args:
        model: a transformed model, a module that contains one, or a part of one (then the reasons are unknown).

    Returns:
        The skipped layers, and the paths of layers that are trained in full because of `modules_to_save`, or because
        their weight requires gradients (a new head).
    """
    adapted = set(adapted_layers(model).values())
    roots = set(collect_parts(model).roots)
    selections: dict[str, dict[str, Selection]] = {}
    for path, part in state_modules(model):
        if part in roots and (state := get_state(part)) is not None:
            selections[path] = {name: Selection(part, config) for name, config in state.configs.items()}
    outside = f"outside of the transformed module {' and '.join(map(repr, selections))}"
    if not selections:
        outside = "unknown: this module is a part of a transformed model"
    skipped, trained = [], []
    for path, layer in state_modules(model):
        kind = find_kind(layer)
        if layer in adapted or not path or not ADAPTER_CHILDREN.isdisjoint(path.split(".")):
            continue
        root = next((root for root in selections if not root or path.startswith(f"{root}.")), None)
        inside, below = {} if root is None else selections[root], path[len(root or "") :].lstrip(".")
        targeted = any(selection.selects(below) for selection in inside.values())
        in_full = bool(layer._parameters) and any(layer in selection.saved for selection in inside.values())
        weight = layer._parameters.get(weight_name(kind)) if kind else None
        if in_full or (selections and not targeted and weight is not None and weight.requires_grad):
            trained.append(path)
        elif kind:
            reason = outside if root is None else reason_of(inside, below, kind)
            skipped.append(SkippedLayer(path, describe(layer), reason, targeted))
    return tuple(skipped), tuple(trained)


def skipped_parameters(model: nn.Module) -> tuple[SkippedParameter, ...]:
    """The 3-D parameters of a model without an adapter, in model order. A shared parameter is listed once.

    Example:
        >>> import torch
        >>> experts = nn.Module()
        >>> experts.up_proj = nn.Parameter(torch.zeros(4, 6, 3), requires_grad=False)
        >>> skipped_parameters(nn.ModuleDict({"experts": experts, "gate": nn.Linear(7, 4)}))
        (SkippedParameter(path='experts.up_proj', owner_type='Module', shape=(4, 6, 3), share=0.692...),)
    """
    total = sum(p.numel() for name, p in model.named_parameters() if ADAPTER_CHILDREN.isdisjoint(name.split(".")))
    return tuple(
        SkippedParameter(path, type(owner).__name__, tuple(parameter.shape), parameter.numel() / total)
        for path, (owner, parameter) in expert_parameters(model).items()
        if not parameter.requires_grad and CHILD + path.rpartition(".")[2] not in owner._modules
    )


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

    def reason(self, path: str, kind: LayerKind) -> str:
        """Return the reason why this adapter is not on the layer with this path."""
        if self.selects(path):
            return "folded or replaced after transform"
        if not is_target(self._unrestricted, path, self.targets):
            return self._why_not_matched(kind)
        for field, words in (("exclude_modules", "excluded by"), ("modules_to_save", "inside")):
            value = getattr(self.config, field)
            if not is_target(replace(self._unrestricted, **{field: value}), path, self.targets):
                return f"{words} {field}={format_names(value)}"
        wanted = f"layers_to_transform={format_names(self.config.layers_to_transform)}"
        if layer_index(self.config, path) is None:
            return f"no layer index in its path, and {wanted} is set"
        return f"layer index not in {wanted}"

    def _why_not_matched(self, kind: LayerKind) -> str:
        targets = self.config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            what = "the output layer" if kind == "linear" else "not a linear layer"
            return f"{what}, which target_modules='all-linear' does not include"
        if targets is None and self.config.target_parameters:
            return "not in target_parameters, and target_modules is not set"
        if targets is None:
            return f"not in the default target_modules of this architecture, {format_names(self.targets)}"
        return f"not {'matched by' if isinstance(targets, str) else 'in'} target_modules={format_names(targets)}"


def reason_of(selections: Mapping[str, Selection], path: str, kind: LayerKind) -> str:
    """Return why a layer does not have an adapter: one reason if all adapters have the same, otherwise one for each.

    `path` is the layer's path below the transformed module.
    """
    reasons = {name: selection.reason(path, kind) for name, selection in selections.items()}
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{reason} (adapter {name})" for name, reason in reasons.items())
