"""The state of a transformed model: its adapters, its adapted layers, and what `transform` changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard, TypeVar

from torch import fx, nn

from hra_fx.compat import is_compiled_module, state_modules
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.class_swap import set_class, unswap
from hra_fx.layers.classes import layer_class_for
from hra_fx.layers.peft_layers import find_peft_layer
from hra_fx.layers.target import FACTORS, REFLECTION, SAVED
from hra_fx.layers.trained_copies import Copies
from hra_fx.selection.select import targeted

M = TypeVar("M")
#: The attribute in which a transformed model stores its `AdapterState`.
RECORD = "_hra_record"
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@dataclass
class AdapterState:
    """The state of a transformed model, in a plain attribute that is copied and pickled with it.

    Attributes:
        configs: adapter name -> configuration.
        active: the active adapters, including merged ones, in the order of the product `W Q_a Q_b ...`.
        merged: whether the active adapters are merged into the weights.
        disabled: whether all adapters are disabled: by a call, or by an open block.
        disabled_calls: the number of calls of `disable_adapters` without a block.
        disabled_blocks: the number of open `with disable_adapters(...)` blocks, in all threads.
        frozen: names of the parameters that `transform` froze.
        layers: all adapted layers, so that a forward does not need to search for them.
        has_copies: whether there are trained copies.
        untrained: why training would not change the active adapters; empty if it would.
    """

    configs: dict[str, HRAConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: bool = False
    disabled: bool = False  # a forward reads only this, because Dynamo makes integers symbolic
    disabled_calls: int = 0
    disabled_blocks: int = 0
    frozen: tuple[str, ...] = ()
    layers: tuple[nn.Module, ...] = ()
    has_copies: bool = False
    untrained: str = ""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has. The blocks that are open are those of the original, so a copy is disabled as by a call."""
        calls = self.disabled_calls + bool(self.disabled_blocks)
        return {**vars(self), "disabled_calls": calls, "disabled_blocks": 0}


def get_state(model: nn.Module) -> AdapterState | None:
    """The state of this module, or `None` if it is not the root of a transformed model."""
    if isinstance(model, fx.GraphModule):
        state = getattr(model._modules.get(FACTORS), "state", None)
    else:
        state = model.__dict__.get(RECORD)  # TorchDynamo of torch 2.6 has no `vars`
    return state if isinstance(state, AdapterState) else None


def attach_state(model: nn.Module, state: AdapterState) -> None:
    """Attach a state to a model. A graph has it in the child that computes the factors."""
    if isinstance(model, fx.GraphModule):
        vars(model._modules[FACTORS])["state"] = state
    else:
        vars(model)[RECORD] = state


def clear_state(model: nn.Module) -> None:
    """Remove the state, if there is one."""
    if isinstance(model, fx.GraphModule):
        model._modules.pop(FACTORS, None)
    else:
        vars(model).pop(RECORD, None)


def check_not_replaced(model: nn.Module) -> None:
    """Check before a training that no layer of a root was replaced, because its active adapters could not be saved."""
    state = get_state(model)
    if state is not None and not set(model.modules()).issuperset(state.layers):
        for name in state.active:
            layers_with(model, state, name)


class AdaptedParts(NamedTuple):
    """All modules of a model and its adapted parts, found in one pass without paths, so that switching is fast."""

    modules: list[nn.Module]
    roots: list[nn.Module]
    layers: list[Any]
    #: (owner, copies) of every module with trained copies.
    copies: list[tuple[nn.Module, Copies]]


def check_is_module(model: object) -> None:
    """Raise an error if a model is not a module."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")


def collect_parts(model: nn.Module) -> AdaptedParts:
    """Collect the adapted parts of a model."""
    check_is_module(model)
    found = AdaptedParts([model], [], [], [])
    seen = {model}
    for module in found.modules:  # the list grows during the loop
        namespace = vars(module)
        if RECORD in namespace or (isinstance(module, fx.GraphModule) and get_state(module)):
            found.roots.append(module)
        for child in namespace["_modules"].values():
            if child is None or child in seen:
                continue
            seen.add(child)
            found.modules.append(child)
            if isinstance(child, HouseholderAdapters):
                found.layers.append(module)
            elif isinstance(child, Copies):
                found.copies.append((module, child))
    return found


def root_of(model: nn.Module, parts: AdaptedParts | None = None) -> tuple[nn.Module, AdapterState]:
    """The transformed model in `model`, and its state: `model` itself, or the module in a wrapper such as DDP.

    `parts` is the result of `collect_parts`, if the caller has it.
    """
    class_name = type(model).__name__
    found = collect_parts(model) if parts is None else parts
    if not found.roots and found.layers:
        raise AdapterError(f"{class_name} is a submodule of a transformed model. Pass the model that was transformed.")
    if not found.roots:
        raise _no_adapters(model)
    if len(found.roots) > 1:
        paths = ", ".join(repr(path) for path, part in model.named_modules() if part in found.roots)
        raise AdapterError(f"{class_name} contains several transformed models ({paths}). Pass one of them.")
    state = get_state(found.roots[0])
    assert state is not None
    return found.roots[0], state


def check_unmerged(state: AdapterState) -> None:
    """Check that no adapter is merged."""
    if state.merged:
        raise AdapterError(f"adapters {list(state.active)} are merged into the weights. Call unmerge_adapter first.")


def names_in(state: AdapterState, names: str | Iterable[str]) -> tuple[str, ...]:
    """Check adapter names and return them as a tuple."""
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if name not in state.configs:
            present = ", ".join(map(repr, state.configs)) or "none"
            raise AdapterError(f"the model has no adapter {name!r}. It has {present}.")
    if len(set(wanted)) < len(wanted):
        raise AdapterError(f"adapter names must be unique, got {list(wanted)}.")
    return wanted


def name_in(state: AdapterState, name: str) -> str:
    """Check the name of one adapter and return it."""
    if not isinstance(name, str):
        raise AdapterError(f"`adapter_name` must be the name of one adapter, got {name!r}.")
    return names_in(state, name)[0]


def is_adapted(module: nn.Module) -> TypeGuard[AdaptedLayer]:
    """Whether a module is an adapted layer."""
    return isinstance(module, AdaptedLayer) and REFLECTION in module._modules


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Path -> layer, for every adapted layer in `model`; a shared layer occurs once."""
    return {path: module for path, module in state_modules(model) if is_adapted(module)}


def layers_with(root: nn.Module, record: AdapterState, name: str) -> list[str]:
    """Paths of the layers with an adapter, which must be those in its configuration."""
    sites, config = [path for path, layer in adapted_layers(root).items() if name in layer.hra_u], record.configs[name]
    if odd := sorted(targeted(root, config).keys() ^ set(sites)):
        raise AdapterError(
            f"adapter {name!r}: {odd[0]} does not match the adapter's configuration, because a part of the model was "
            "folded or replaced after transform. Its file could not be loaded. Replace parts before transform, fold "
            "the whole model, and compile a part in place (part.compile())."
        )
    return sites


def require_adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Like `adapted_layers`, but the result is never empty."""
    check_is_module(model)
    layers = adapted_layers(model)
    if not layers:
        raise _no_adapters(model)
    return layers


def _no_adapters(model: nn.Module) -> AdapterError:
    class_name = type(model).__name__
    if found := find_peft_layer(model):
        return AdapterError(f"{class_name} was adapted by PEFT ({found[0]}), not by hra_fx. {found[1]}")
    return AdapterError(f"{class_name} has no adapters. Call hra_fx.transform(model, config) first.")


def unwrap(model: M) -> M:
    """The model inside DDP, `DataParallel`, `torch.compile` or a `PeftModel` of `from_peft`, or the model itself."""
    inner: Any = model
    while True:
        if is_compiled_module(inner):
            inner = inner._modules["_orig_mod"]
        elif isinstance(inner, _PARALLEL):
            inner = inner.module
        elif getattr(type(inner), "_hra_is_taken_over", False):
            inner = inner.get_base_model()
        else:
            return inner  # type: ignore[no-any-return]


@contextmanager
def base_model_view(model: nn.Module) -> Iterator[None]:
    """Context manager in which the model is as before `transform`, except for trained copies that are in use."""
    with ExitStack() as restore:
        for module in list(model.modules()):
            if isinstance(module, AdaptedLayer) and REFLECTION in module._modules:
                restore.callback(set_class, module, type(module))  # FSDP2 has a class over ours
                unswap(module, layer_class_for(module))
            if SAVED in module._modules or REFLECTION in module._modules:
                # In their previous order, which is the order of parameters and of optimizer states.
                restore.callback(module._modules.update, dict(module._modules))
                restore.callback(module._modules.clear)
                for child in (SAVED, REFLECTION):
                    module._modules.pop(child, None)
            if RECORD in vars(module):
                restore.callback(vars(module).__setitem__, RECORD, vars(module).pop(RECORD))
        yield
