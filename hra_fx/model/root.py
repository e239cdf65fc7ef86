"""The class of an adapted model, and `mixed_batch`: run a batch with a different adapter for each row.

A trained copy that is in use has the name of the tensor that it replaces, so the names in a `state_dict` depend on the
active adapter. Entries are renamed before they are loaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.compat import is_exporting, is_replica
from hra_fx.errors import AdapterError
from hra_fx.kernels.dispatch import is_compiling
from hra_fx.layers.adapters import get_adapters
from hra_fx.layers.batching import batch_of_rows, factors_in_batches, factors_in_traced_batches, is_in_forward
from hra_fx.layers.class_swap import SwapMixin, swap, unswap
from hra_fx.layers.containers import ANCHOR
from hra_fx.layers.mixed import BASE_ROW, CURRENT, MixedBatch
from hra_fx.layers.sharding import first_split, gather_groups, is_sharded
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import BASE, all_copies, get_copies
from hra_fx.model.state import AdapterState, adapted_layers, get_state, names_in, root_of


class AdaptedModel(SwapMixin):
    """A model that was transformed."""

    _hra_priority = 2

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Wrap `forward` and `generate` of `base` to compute the factors of all layers at their start.

        Both take `adapter_names`, as in PEFT's LoRA: see `mixed_batch`.
        """

        @functools.wraps(base.forward)
        def forward(self: AdaptedModel, *args: Any, **kwargs: Any) -> Any:
            if (names := kwargs.pop("adapter_names", None)) is not None:
                with mixed_batch(self, names):
                    return forward(self, *args, **kwargs)
            if is_exporting():  # torch.export records the state that a forward writes
                return base.forward(self, *args, **kwargs)
            layers = _acting_layers(self, in_forward=True)
            if not layers:
                return base.forward(self, *args, **kwargs)
            with factors_in_traced_batches(layers) if is_compiling() else factors_in_batches(layers):
                return base.forward(self, *args, **kwargs)

        made = inspect.getattr_static(base, "generate", None)
        if not isinstance(made, FunctionType):
            return {"forward": forward}

        @functools.wraps(made)
        def generate(self: AdaptedModel, *args: Any, **kwargs: Any) -> Any:
            if (names := kwargs.pop("adapter_names", None)) is not None:
                with mixed_batch(self, names):
                    return generate(self, *args, **kwargs)
            with ExitStack() as block:
                if CURRENT.batch is not None:
                    block.enter_context(copied_rows(self, kwargs))
                layers = _acting_layers(self)
                if layers and not is_compiling():
                    # Forwards with gradients, if there are any, do not use factors computed without gradients.
                    with torch.no_grad():
                        block.enter_context(factors_in_batches(layers, reuse=True))
                return made(self, *args, **kwargs)

        return {"forward": forward, "generate": generate}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Rename entries. This is called before the children load their entries."""
        self._refuse_across_a_merge(state_dict, prefix, rest[-1])
        parts = (key.rpartition(f".{REFLECTION}.") for key in state_dict if key.startswith(prefix))
        theirs = {name.removesuffix(ANCHOR) for path, _, name in parts if path}
        # Every path of a shared module, because a state_dict has all of them.
        for path, owner in self.named_modules(remove_duplicate=False):
            copies = get_copies(owner)
            if copies is None:
                continue
            place = f"{prefix}{path}." if path else prefix
            for name, ours in copies.in_place.items():
                owners = [adapter for adapter, names in copies.copied.items() if name in names]
                waiting = {owner: f"{place}{SAVED}.{owner}.{name}" for owner in (BASE, *owners)}
                _rename(state_dict, f"{place}{name}", waiting, ours, theirs)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _refuse_across_a_merge(self, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Report an error if only one of the two is merged: weights would be rotated twice or not at all."""
        given = [key for key in state if key.startswith(prefix)]
        there = any(key.endswith(f".{REFLECTION}.unmerged") for key in given)
        here = any(layer.hra_u.unmerged is not None for layer in adapted_layers(self).values())
        if not given or there is here:
            return
        side = "state_dict but not in the model" if there else "model but not in the state_dict"
        fix = "Call hra_fx.merge_adapter or hra_fx.unmerge_adapter first."
        errors.append(f"{prefix}: adapters are merged in the {side}. {fix}")
        # Use the current values, so that a load that is going to fail does not change anything.
        state.update({f"{prefix}{key}": own for key, own in self.state_dict().items() if f"{prefix}{key}" in state})


def _acting_layers(model: AdaptedModel, *, in_forward: bool = False) -> tuple[nn.Module, ...]:
    """The adapted layers of a model with active adapters, if their factors can be computed together.

    This is not possible in a replica of DataParallel, or if FSDP reduces the gradients of a block before the batch has
    its gradients. If all vectors are in separate groups (`fully_shard` of the containers), they are gathered at the
    start of the forward.
    """
    state = get_state(model)
    if state is None or state.disabled or is_replica(model):
        return ()
    if not state.active and CURRENT.batch is None:
        return ()
    if is_sharded(model):
        containers = [adapters for layer in state.layers if (adapters := get_adapters(layer)) is not None]
        if not in_forward or is_compiling() or not gather_groups(model, containers):
            return ()
    return state.layers


def _rename(state: dict[str, Any], in_place: str, waiting: dict[str, str], ours: str, theirs: set[str]) -> None:
    """Rename the copies of one tensor in a `state_dict` to their names in the model.

    The tensor itself is `in_place`; `waiting` is adapter or `BASE` -> the name of a copy that is not in use. In the
    model, the copy of `ours` is in use. `theirs` are the adapters in the `state_dict`.
    """
    values: dict[str, Tensor] = {owner: state.pop(key) for owner, key in waiting.items() if key in state}
    if in_place in state:
        # The copy in use is the one without another name: of an adapter of the state_dict, else of the base model.
        owner = next((owner for owner in waiting if owner in theirs and owner not in values), BASE)
        if owner in values:  # that of an adapter that the model does not have; load_state_dict reports it
            state[waiting[BASE].replace(f".{BASE}.", ".of_another_adapter.")] = state.pop(in_place)
        else:
            values[owner] = state.pop(in_place)
    state.update({in_place if owner == ours else waiting[owner]: value for owner, value in values.items()})


class AdaptedBody(SwapMixin):
    """The body of a transformed model. If it is called alone, it also computes the factors of its layers in batches."""

    _hra_priority = 1

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Wrap `forward` of `base` to compute the factors at its start, unless the model's forward is running."""

        @functools.wraps(base.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_compiling() or is_exporting() or is_in_forward() or is_replica(self) or is_sharded(self):
                return base.forward(self, *args, **kwargs)
            with factors_in_batches([part for part in self.modules() if REFLECTION in part._modules]):
                return base.forward(self, *args, **kwargs)

        return {"forward": forward}


def swap_body(model: nn.Module, undo: ExitStack) -> None:
    """Swap the class of the body of a model, if it has one."""
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        undo.callback(unswap, body, AdaptedBody)
        swap(body, AdaptedBody)


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Context manager in which each row of the batch uses its own adapter, independent of the active adapters.

    `model(..., adapter_names=...)` and `model.generate(..., adapter_names=...)` do the same for one call, as in PEFT's
    LoRA. Each adapted layer runs two batched products for all rows, for any number of adapters. The adapters may differ
    in layers, rank, scale and Gram-Schmidt. In `generate`, a row's adapter also applies to its beams and returned
    sequences. Other threads are not affected.

    Args:
        model: a transformed model, in eval mode.
        adapter_names: one name per row of the batch; `"__base__"` is the base model. The batch must be the first
            dimension of the input of every adapted layer.

    Raises:
        AdapterError: `adapter_names` is not a list of names; the model has no such adapter; the model is in training
            mode, sharded, or a captured graph; a mixed batch of another model is open; adapters are merged; the rows
            would need different trained copies (`modules_to_save`, `bias`); or an adapter is on a layer that is
            adapted through its weight. The forward raises it if the number of rows in the input of a layer differs
            from the number of names.

    Example:
        >>> from hra_fx import HRAConfig, add_adapter, transform
        >>> config = HRAConfig(r=2, target_modules=["0"], init_weights=False)
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), config, "en").eval()
        >>> add_adapter(model, "fr", config)
        >>> with mixed_batch(model, ["en", "fr", "__base__", "en"]):
        ...     model(torch.ones(4, 6)).shape
        torch.Size([4, 4])
    """
    batch = _checked(model, adapter_names)
    if CURRENT.batch is not None and CURRENT.batch.state is not batch.state:
        raise AdapterError("a mixed batch of another model is open. Close that block first.")
    with batch_of_rows(batch):
        yield


@contextmanager
def copied_rows(model: Any, options: dict[str, Any]) -> Iterator[None]:
    """Context manager for `generate` in a mixed batch, which repeats each row for its beams and returned sequences."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    given = [options.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
    outer, CURRENT.copies = CURRENT.copies, max(number or 1 for number in given)
    try:
        yield
    finally:
        CURRENT.copies = outer


def _checked(model: nn.Module, adapter_names: Sequence[str]) -> MixedBatch:
    """Check the names and return their batch; raises the errors of `mixed_batch`."""
    own = get_state(model) if isinstance(model, nn.Module) else None
    # TorchDynamo cannot trace the search for the root; in a compiled forward, the model is the root itself.
    root, state = root_of(model) if own is None else (model, own)
    is_list = isinstance(adapter_names, Sequence) and not isinstance(adapter_names, str) and bool(adapter_names)
    if not is_list or not all(isinstance(name, str) for name in adapter_names):
        raise AdapterError(f"adapter_names must be a list with one name per row of the batch, got {adapter_names!r}.")
    rows = tuple(adapter_names)
    used = dict.fromkeys(rows)
    names_in(state, [name for name in used if name != BASE_ROW])
    _check_model(root, state)
    _check_copies(root, tuple(used))
    layers = adapted_layers(root)
    for path, layer in layers.items():
        here = [name for name in used if name in layer.hra_u.specs]
        if here and not layer.hra_u.reflects_input:
            raise AdapterError(
                f"{path} ({type(layer).__name__}): adapters {here} change the weight of this layer, but the rows of a "
                "mixed batch would need different weights. Run the rows of each adapter in a separate batch."
            )
    containers = frozenset([layer.hra_u for layer in layers.values()])
    # If names repeat, use the order of the model, so that a compiled graph is valid for a set of adapters.
    names = rows if len(used) == len(rows) else tuple(name for name in (*state.configs, BASE_ROW) if name in used)
    places = None if len(used) == len(rows) else torch.tensor([names.index(name) for name in rows])
    return MixedBatch(names, len(rows), places, containers, state)


def _check_model(root: nn.Module, state: AdapterState) -> None:
    if root.training:
        raise AdapterError(
            "A mixed batch is for inference, but the model is in training mode. Call model.eval() first."
        )
    if state.merged:
        raise AdapterError(f"adapters {list(state.merged)} are merged into the weights. Call unmerge_adapter first.")
    if sharded := first_split(root):
        raise AdapterError(
            f"{sharded[0]}: {sharded[1]} has sharded its parameters. A mixed batch needs an unsharded model."
        )


def _check_copies(root: nn.Module, names: Sequence[str]) -> None:
    """Check that no row needs a trained copy other than the one in use."""
    for path, (_, copies) in all_copies(root).items():
        for entry, present in copies.in_place.items():
            for name in names:
                if (name if entry in copies.copied.get(name, ()) else BASE) != present:
                    owner = "the base model" if present == BASE else f"adapter {present!r}"
                    raise AdapterError(
                        f"{path}.{entry}".lstrip(".")
                        + f": the copy in use is that of {owner}, but rows of {name!r} need another copy "
                        "(modules_to_save or bias). All rows of a batch share one copy: run these rows in a separate "
                        "batch."
                    )
