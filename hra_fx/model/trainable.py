"""Which adapters are active, and which parameters of an adapted model are trainable."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hra_fx.compat import state_modules
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, HRAWarning, UnsupportedLayerError
from hra_fx.layers.accelerate_hooks import offloading_hook
from hra_fx.layers.adapters import get_adapters
from hra_fx.layers.experts import adapted_parameters
from hra_fx.layers.target import ADAPTER_CHILDREN, SAVED, weight_place
from hra_fx.layers.trained_copies import BASE, Copies, all_copies, get_copies, own_tensors
from hra_fx.model.state import AdaptedParts, AdapterState
from hra_fx.model.whole import check_whole
from hra_fx.selection.select import saved_modules

#: Names of biases; the second one is the bias of q, k and v in nn.MultiheadAttention.
_BIASES = ("bias", "in_proj_bias")
#: Path -> (module, names of its tensors).
ToCopy: TypeAlias = Mapping[str, tuple[nn.Module, tuple[str, ...]]]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def freeze(model: nn.Module) -> tuple[str, ...]:
    """Freeze every parameter of the base model. Returns the names of those that were trainable."""
    # List tied parameters under each of their names, because a trained copy may untie them.
    named = model.named_parameters(remove_duplicate=False)
    trained = {name: parameter for name, parameter in named if parameter.requires_grad and _is_base(name)}
    for parameter in trained.values():
        parameter.requires_grad = False  # a lazy parameter has no methods
    return tuple(trained)


def unfreeze(model: nn.Module, names: Iterable[str]) -> None:
    """Make the parameters that `freeze` froze trainable again."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name in parameters:
            parameters[name].requires_grad = True


def set_requires_grad(parts: AdaptedParts, wanted: Mapping[str, bool]) -> None:
    """Train or freeze the vectors and copies of some adapters. The flags of other adapters do not change."""
    for layer in parts.layers:
        for name in layer.hra_u.specs:
            if name in wanted:
                layer.hra_u.set_trainable(name, wanted[name])
    for owner, copies in parts.copies:
        for name in copies.copied:
            if name in wanted:
                copies.set_trainable(owner, name, wanted[name])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters, counted as in PEFT: a trained bias counts once."""
    waiting = {  # biases of the base model while a trained copy is in use
        copies.get(owner, BASE, "bias")
        for owner, copies in all_copies(model).values()
        if copies.names == {"bias"} and copies.in_use != BASE
    }
    counted = [parameter for parameter in model.parameters() if parameter not in waiting]
    return sum(one.numel() for one in counted if one.requires_grad), sum(one.numel() for one in counted)


def make_copies(model: nn.Module, name: str, wanted: ToCopy, values: Mapping[tuple[str, str], Tensor]) -> None:
    """Create the trained copies of adapter `name`. They are not in use.

    `values`, (path of the module, name of its tensor) -> tensor, replaces the values of the base model. Tensors that
    are tied in the base model have one copy, unless their values differ, because PEFT trains a copy of each.
    """
    tensors = {(path, entry): getattr(owner, entry) for path, (owner, names) in wanted.items() for entry in names}
    parted = differ_by_place(tensors, values)
    memo: dict[int, nn.Parameter] = {}
    for path, (owner, names) in wanted.items():
        copies = get_copies(owner)
        if copies is None:
            copies = Copies()
            copies.train(owner.training)
            owner.add_module(SAVED, copies)
        given = {entry: values[path, entry] for entry in names if (path, entry) in values}
        copies.make(owner, name, names, {} if parted else memo, given)
    groups = tied_groups(model, (name,)) if wanted and not values else ()
    if group := next((group for group in groups if len(set(group.values())) > 1), None):
        text = f"{' and '.join(group)} are tied, and adapter {name!r} trains a copy of one of them alone."
        warnings.warn(text, HRAWarning, stacklevel=5)


def tied_groups(model: nn.Module, adapters: Collection[str]) -> list[dict[str, int]]:
    """For each tensor of the base model: its names -> the id of the tensor there with the copies of these adapters."""
    groups: dict[int, dict[str, int]] = {}
    for path, module in state_modules(model):
        copies = get_copies(module)
        for entry, tensor in module._parameters.items() if SAVED not in path.split(".") else ():
            base, own = tensor, tensor
            if copies is not None and entry in copies.names:
                adapter = next((name for name in adapters if entry in copies.copied.get(name, ())), BASE)
                base, own = copies.get(module, BASE, entry), copies.get(module, adapter, entry)  # type: ignore[assignment]
            if tensor is not None:
                groups.setdefault(id(base), {})[f"{path}.{entry}".lstrip(".")] = id(own)
    return list(groups.values())


def differ_by_place(tensors: Mapping[tuple[str, str], Tensor], values: Mapping[tuple[str, str], Tensor]) -> bool:
    """Whether a tensor that several modules share has different values for them."""
    first: dict[int, Tensor] = {}
    pairs = [
        (first.setdefault(id(tensors[place]), value), value) for place, value in values.items() if place in tensors
    ]
    return any(one is not other and not torch.equal(one, other.to(one)) for one, other in pairs)


def to_copy(model: nn.Module, config: HRAConfig, layers: Mapping[str, nn.Module]) -> ToCopy:
    """The tensors that an adapter trains in full (modules and biases), by path."""
    found: dict[int, tuple[str, nn.Module, tuple[str, ...]]] = {}
    for root, saved in saved_modules(model, config).items():
        for below, owner in state_modules(saved):
            if names := own_tensors(owner) if _is_base(below) else ():
                found.setdefault(id(owner), (f"{root}.{below}".rstrip("."), owner, names))
    owners = state_modules(model) if config.bias == "all" else layers.items() if config.bias == "hra_only" else ()
    for path, owner in owners:
        names = tuple(entry for entry in _BIASES if owner._parameters.get(entry) is not None)
        if _is_base(path) and names:
            found.setdefault(id(owner), (path, owner, names))
    return {path: (owner, names) for path, owner, names in found.values()}


def checked_copies(model: nn.Module, config: HRAConfig, layers: Mapping[str, nn.Module]) -> ToCopy:
    """`to_copy`. Raises an error if a tensor cannot be copied, before anything is changed."""
    wanted = to_copy(model, config, layers)
    for path, (owner, names) in wanted.items():
        if reason := _why_not_copied(owner, names, layers.values()):
            hint = "Name other modules in modules_to_save, or set bias='none'."
            raise UnsupportedLayerError(f"{path} ({type(owner).__name__}): {reason}. {hint}")
    return wanted


def _why_not_copied(owner: nn.Module, names: tuple[str, ...], layers: Iterable[nn.Module]) -> str | None:
    if offloading_hook(owner) is not None:
        return "accelerate offloads it, and would overwrite a trained copy with the base model's tensors"
    if isinstance(owner, _CONTAINERS):
        return f"it is a container with its own tensors ({', '.join(names)}), which cannot be copied"
    own = [owner] if get_adapters(owner) is not None else []
    reflected = [weight_place(layer) for layer in (*layers, *own, *adapted_parameters(owner))]
    if name := next((name for name in names if (owner, name) in reflected), None):
        return f"an adapter reflects its {name}, so it cannot be saved in full too"
    for name in names:
        tensor = owner._parameters.get(name)
        if tensor is not None and (is_lazy(tensor) or type(tensor) is not nn.Parameter):
            return f"its {name} is a {type(tensor).__name__}, which cannot be copied for training"
    return None


def _is_base(name: str) -> bool:
    """Whether a path or the name of a tensor belongs to the base model."""
    return ADAPTER_CHILDREN.isdisjoint(name.split("."))


def activate(parts: AdaptedParts, state: AdapterState, names: tuple[str, ...], *, trainable: bool) -> None:
    """Activate and train exactly these adapters."""
    state.active = names
    sync_layers(parts, state)
    set_requires_grad(parts, {name: trainable and name in names for name in state.configs})


def sync_layers(parts: AdaptedParts, state: AdapterState) -> None:
    """Update every adapted layer and every trained copy from the state of the model."""
    state.layers, state.has_copies = tuple(parts.layers), bool(parts.copies)
    state.disabled = bool(state.disabled_calls or state.disabled_blocks)
    acting = () if state.disabled else state.active
    for layer in parts.layers:
        layer.hra_u.set_active(name for name in acting if name in layer.hra_u.specs and not state.merged)
    for owner, copies in parts.copies:
        copies.use(owner, copies.wanted(acting))
    state.untrained = _why_untrained(parts, state)


def _why_untrained(parts: AdaptedParts, state: AdapterState) -> str:
    """Why training would not change the active adapters: their vectors do not get a gradient."""
    scaled = {name for layer in parts.layers for name in layer.hra_u.scales}
    if state.merged:
        reason, fix = "they are merged into the weights", "hra_fx.unmerge_adapter(model)"
    elif state.disabled:
        reason, fix = "they are disabled (disable_adapters)", f"hra_fx.set_adapter(model, {list(state.active)})"
    elif state.active and scaled.issuperset(state.active):
        reason, fix = "their scale is not 1", f"hra_fx.set_scale(model, {state.active[0]!r}, 1)"
    else:
        return ""
    return f"training would not change adapters {list(state.active)}, because {reason}. Call {fix} first."


def check_copies_can_switch(root: nn.Module, parts: AdaptedParts, acting: Iterable[str]) -> None:
    """Raise an error if trained copies must be switched in a sharded or offloaded model."""
    names = tuple(acting)
    if any(copies.wanted(names) != copies.in_use for _, copies in parts.copies):
        check_whole(root, "switch its trained copies", "modules")


def check_copies(root: nn.Module, names: Iterable[str]) -> None:
    """Check that at most one of these adapters has a trained copy of each module."""
    wanted = tuple(names)
    for path, (_, copies) in all_copies(root).items():
        several = [name for name in wanted if name in copies.copied]
        if len(several) > 1:
            raise AdapterError(
                f"adapters {several} each have a trained copy of {path or 'the model'} (modules_to_save or bias), and "
                "only one copy can be used at a time. Set one of these adapters."
            )
