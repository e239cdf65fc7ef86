"""The class of an adapted model: a call of it is a run, with the factors of all layers.

A trained copy that is in use has the name of the tensor that it replaces, so the names in a `state_dict` depend on the
active adapter. Entries are renamed before they are loaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch  # the code that Dynamo of torch 2.6 writes for this file reads this name
from torch import Tensor, nn

from hra_fx.compat import is_compiling, is_plain_eager, pytree
from hra_fx.errors import AdapterError
from hra_fx.layers.adapter_states import check_states
from hra_fx.layers.batch import start, traced_batch
from hra_fx.layers.class_swap import SwapMixin, swap
from hra_fx.layers.running import RUNNING, WITHOUT_FACTORS, during
from hra_fx.layers.sharding import is_sharded
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import BASE, Copies, all_copies, get_copies, in_order
from hra_fx.model.state import check_not_replaced, get_state


class AdaptedModel(SwapMixin):
    """A model that was transformed."""

    _hra_priority = 3

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, also if another tool has set a `forward` on it (TRL, Liger, accelerate).

        The factors are computed in `forward`, because hooks may first move the model or gather its parameters.
        """
        if not isinstance(self, AdaptedModel):  # torch.compile keeps this method when the adapters are removed
            return self(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return super().__call__(*args, **kwargs)
        return during(RUNNING.run or WITHOUT_FACTORS, super().__call__, *args, **kwargs)

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Wrap `forward` of `base` to compute the factors of all layers at its start, and `generate` to keep them."""

        @functools.wraps(base.forward)
        def forward(self: AdaptedModel, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("adapter_names") is not None:  # models that take any keyword argument would ignore it
                raise TypeError(
                    "`adapter_names` is not supported. Group the rows by adapter, and call the model once for each."
                )
            if not torch.compiler.is_dynamo_compiling():
                run = start(self, functools.partial(_acting_layers, self))
                return _watched(self, during(run, base.forward, self, *args, **kwargs))
            with traced_batch(() if is_sharded(self) or not is_compiling() else _acting_layers(self)):
                return base.forward(self, *args, **kwargs)

        method = inspect.getattr_static(base, "generate", None)
        methods = {name: _ordered(getattr(base, name)) for name in ("named_parameters", "named_buffers")}
        generate = {"generate": _generation(method)} if inspect.isfunction(method) else {}
        return {"forward": forward, **methods, **generate}

    def train(self, mode: bool = True) -> Any:
        """Set the mode. For training, no adapted layer may have been replaced."""
        if mode:
            check_not_replaced(self)
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like `nn.Module.state_dict`, in an order that does not depend on the active adapters."""
        found = super().state_dict(*args, **kwargs)
        if _has_copies(self):
            items = in_order(self, found.items(), kwargs.get("prefix", ""))
            found.clear()
            found.update(items)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Rename entries. This is called before the children load their entries."""
        given = [key for key in state_dict if key.startswith(prefix)]
        merged = any(key.endswith(f".{REFLECTION}.unmerged") for key in given)
        if given and merged is not bool((state := get_state(self)) and state.merged):
            raise AdapterError(
                f"adapters are merged in the {'state_dict' if merged else 'model'} only. Call hra_fx.merge_adapter or "
                "hra_fx.unmerge_adapter first."
            )
        check_states(self, state_dict, prefix)
        parts = (key.rpartition(f".{REFLECTION}.") for key in given)
        theirs = {name for path, _, name in parts if path}  # the adapters in the state_dict
        # Every path of a shared module, because a state_dict has all of them.
        for path, owner in self.named_modules(remove_duplicate=False):
            if (copies := get_copies(owner)) is not None:
                _rename(state_dict, f"{prefix}{path}." if path else prefix, copies, copies.entries(owner), theirs)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _has_copies(model: nn.Module) -> bool:
    return (state := get_state(model)) is not None and state.has_copies


def _ordered(named: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `named_parameters` or `named_buffers`: their order does not depend on the active adapters."""

    @functools.wraps(named)
    def ordered(self: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        if not _has_copies(self):
            return named(self, prefix, recurse, remove_duplicate)  # type: ignore[no-any-return]
        found: dict[int | str, tuple[str, Tensor]] = {}
        for name, one in in_order(self, named(self, prefix, recurse, False), prefix):
            found.setdefault(id(one) if remove_duplicate else name, (name, one))
        return iter(found.values())

    return ordered


def _generation(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method: all forwards of a model in one call of it use the same factors."""

    @functools.wraps(generate)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outer = RUNNING.generation
        RUNNING.generation = {} if outer is None else outer
        try:
            return generate(self, *args, **kwargs)
        finally:
            RUNNING.generation = outer

    return run


def _acting_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The adapted layers of a model with active adapters, or of its body."""
    state = get_state(model)
    if state is None:
        return [part for part in model.modules() if REFLECTION in part._modules]
    return () if state.disabled else state.layers


def _watched(model: nn.Module, output: Any) -> Any:
    """The output of a model, through which a backward pass raises an error if it cannot train the adapters.

    The state at the time of the backward pass decides, because a loss may compare with an output of the base model.
    A model in eval mode without trained copies may compute gradients of its inputs.
    """
    state = get_state(model)
    if state is None or not state.untrained or not torch.is_grad_enabled() or not is_plain_eager():
        return output
    if not any(one.requires_grad for layer in state.layers for one in layer.get_submodule(REFLECTION).parameters()):
        return output

    def check(_: Tensor) -> None:
        if state.untrained and (model.training or all_copies(model)):
            raise AdapterError(state.untrained)

    def watched(part: Any) -> Any:
        is_real = isinstance(part, Tensor) and part.is_floating_point()
        return part + zero if is_real and (model.training or part.requires_grad) else part

    zero = torch.zeros((), requires_grad=True)
    zero.register_hook(check)  # type: ignore[no-untyped-call]
    # Not into a cache, which must stay the same object.
    return pytree.tree_map(watched, output, is_leaf=lambda part: not isinstance(part, (tuple, list, dict)))


def _rename(
    state: dict[str, Any], place: str, copies: Copies, entries: dict[tuple[str, str], str], theirs: set[str]
) -> None:
    """Rename the tensors of one module in a `state_dict`, whose adapters are `theirs`, to their names in the model."""
    for name in copies.names:
        keys = {owner: place + entry for (owner, own), entry in entries.items() if own == name}
        waiting = {owner: f"{place}{SAVED}.{owner}.{name}" for owner in keys}
        values: dict[str, Tensor] = {owner: state.pop(key) for owner, key in waiting.items() if key in state}
        if f"{place}{name}" in state:
            # The copy in use is the one without another name: of an adapter of the state_dict, else of the base model.
            # If the base model has another name, it is of an adapter that this model does not have.
            used = next((owner for owner in keys if owner in theirs and owner not in values), BASE)
            values.setdefault(used, state.pop(f"{place}{name}"))
        state.update({keys[owner]: value for owner, value in values.items()})


class AdaptedBody(SwapMixin):
    """The body of a transformed model, which also starts a run if it is called alone."""

    _hra_priority = 2

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Wrap `forward` of `base` to compute the factors at its start, unless the model's forward is running."""

        @functools.wraps(base.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_compiling() or (RUNNING.run is not None and RUNNING.run.prepared):
                return base.forward(self, *args, **kwargs)
            run = start(self, functools.partial(_acting_layers, self))
            return during(run, base.forward, self, *args, **kwargs)

        return {"forward": forward}


def swap_root(model: nn.Module, root_class: type[SwapMixin]) -> None:
    """Swap the class of a model, and that of its body, if it has one."""
    swap(model, root_class)
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        swap(body, AdaptedBody)
