"""Which parameters an adapted model trains: the vectors of the active adapters, and the copies that they ask for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hra_fx.config import HRAConfig
from hra_fx.errors import UnsupportedLayerError
from hra_fx.layers.adapters import reflection_of
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import Copies, held_by, own_tensors
from hra_fx.model.state import Inventory, Record
from hra_fx.model.tied import tied_to
from hra_fx.model.untie import Place, settings_that_tie, still_tied, turn_off, turn_on, why_not_off
from hra_fx.selection.select import saved_modules

#: What a bias is called; in an attention, that of q, k and v.
_BIASES = ("bias", "in_proj_bias")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Changes:
    """What `freeze` changed: parameter name -> `requires_grad` (before, after)."""

    flags: dict[str, tuple[bool, bool]]

    def restore(self, model: nn.Module) -> None:
        """Set back every flag that is still as `freeze` left it; one that somebody set since stays."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, (before, after) in self.flags.items():
            if name in parameters and parameters[name].requires_grad is after:
                _set_flag(parameters[name], before)


def freeze(model: nn.Module) -> Changes:
    """Freeze every parameter of the base model."""
    changes = Changes({})
    try:
        # Tied tensors by each of their names: a trained copy may part them.
        named = [item for item in model.named_parameters(remove_duplicate=False) if item[1].requires_grad]
        for name, parameter in named:
            if _is_base(name):
                _set_flag(parameter, False)
                changes.flags[name] = (True, False)
    except BaseException:
        changes.restore(model)
        raise
    return changes


def train_only(parts: Inventory, names: Iterable[str]) -> None:
    """Give gradients to the vectors and copies of some adapters, and take them from those of all others."""
    wanted = set(names)
    for reflection in parts.reflections:
        for name in reflection.specs:
            reflection.give_gradient(name, name in wanted)
    for owner, copies in parts.copies:
        for name in copies.copied:
            copies.give_gradient(owner, name, name in wanted)


def give_gradients(parts: Inventory, names: Iterable[str], wanted: bool) -> None:
    """Give gradients to the vectors and copies of some adapters, or take them; others keep theirs."""
    for name in names:
        for reflection in parts.reflections:
            if name in reflection.specs:
                reflection.give_gradient(name, wanted)
        for owner, copies in parts.copies:
            copies.give_gradient(owner, name, wanted)


def make_copies(
    model: nn.Module,
    name: str,
    config: HRAConfig,
    sites: Mapping[str, nn.Module],
    record: Record,
    undo: ExitStack,
    values: Mapping[tuple[str, str], Tensor],
) -> None:
    """Copy what `config.modules_to_save` and `config.bias` train, for adapter `name`; the copies wait.

    `values`, (path of the module, name of its tensor) -> tensor, goes in place of what the base model has.

    Biases: none, all in the model (`"all"`), or those of the adapted layers (`"hra_only"`).

    Raises:
        UnsupportedLayerError: a tensor that cannot be copied, or a layer that another adapter reflects.
    """
    wanted = to_copy(model, config, sites)
    for path, (owner, names) in wanted.items():
        if reason := _why_not(owner, names):
            raise UnsupportedLayerError(f"{path} ({type(owner).__name__}): {reason}.")
    originals = {f"{path}.{n}".lstrip("."): getattr(owner, n) for path, (owner, names) in wanted.items() for n in names}
    tied = {other for others in tied_to(model, originals).values() for other in others}
    memo: dict[int, nn.Parameter] = {}
    for path, (owner, names) in wanted.items():
        copies = held_by(owner)
        if copies is None:
            copies = Copies()
            copies.train(owner.training)
            undo.callback(owner._modules.pop, SAVED, None)
            owner.add_module(SAVED, copies)
        undo.callback(copies.remove, owner, name)
        given = {entry: values[path, entry] for entry in names if (path, entry) in values}
        copies.make(owner, name, names, memo, given)
    if tied - originals.keys():
        _untie(model, record, {(owner, name) for owner, names in wanted.values() for name in names}, undo)


def settle_ties(model: nn.Module, record: Record) -> None:
    """Say again in the model's configuration that embeddings are tied, where they are and no copy can untie them."""
    if record.untied:
        again = still_tied(model, record.untied)
        turn_on(again)
        record.untied = tuple(config for config in record.untied if not any(config is one for one in again))


def _untie(model: nn.Module, record: Record, places: Collection[Place], undo: ExitStack) -> None:
    """transformers ties weights anew whenever it likes, by its configuration, and would overwrite a trained copy."""
    settings = settings_that_tie(model, places)
    if reason := why_not_off(settings):
        raise UnsupportedLayerError(f"{reason}. Leave it out of modules_to_save.")
    undo.callback(setattr, record, "untied", record.untied)
    off = turn_off(settings)
    undo.callback(turn_on, off)
    record.untied = (*record.untied, *off)


def to_copy(
    model: nn.Module, config: HRAConfig, sites: Mapping[str, nn.Module]
) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """Path -> (module, names of its tensors)."""
    found: dict[int, tuple[str, nn.Module, tuple[str, ...]]] = {}
    for root, saved in saved_modules(model, config).items():
        for below, owner in saved.named_modules():
            if names := own_tensors(owner) if _is_base(f"{below}.") else ():
                found.setdefault(id(owner), (f"{root}.{below}".rstrip("."), owner, names))
    owners = model.named_modules() if config.bias == "all" else sites.items() if config.bias == "hra_only" else ()
    for path, owner in owners:
        names = tuple(name for name in _BIASES if owner._parameters.get(name) is not None)
        if _is_base(f"{path}.") and names:
            found.setdefault(id(owner), (path, owner, names))
    return {path: (owner, names) for path, owner, names in found.values()}


def _why_not(owner: nn.Module, names: tuple[str, ...]) -> str | None:
    way_out = "Name other modules in modules_to_save, or set bias='none'"
    if isinstance(owner, _CONTAINERS):
        return (
            f"it runs its children one by one and holds {', '.join(names)} besides, so no copy fits into it. {way_out}"
        )
    reflection = reflection_of(owner)
    if reflection is not None and reflection.weight_name in names:
        return "another adapter reflects this layer, so it cannot be saved in full too. Fold or delete that one first"
    for name in names:
        tensor = owner._parameters.get(name)
        if tensor is not None and (is_lazy(tensor) or type(tensor) is not nn.Parameter):
            return f"its {name} is a {type(tensor).__name__}, which cannot be copied for training. {way_out}"
    return None


def _is_base(name: str) -> bool:
    return {REFLECTION, SAVED}.isdisjoint(name.split("."))


def _set_flag(parameter: nn.Parameter, wanted: bool) -> None:
    if is_lazy(parameter):  # allows no method before it is initialised
        parameter.requires_grad = wanted
    else:
        parameter.requires_grad_(wanted)
