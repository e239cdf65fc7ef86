"""`reset_adapters`: initialize adapters again, as `transform` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError
from hra_fx.functional import householder
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.sharding import random_numbers_of_first_rank
from hra_fx.layers.trained_copies import BASE, all_copies
from hra_fx.model.offload import load_vectors
from hra_fx.model.replace import check_replaceable, layers_of, replace_values
from hra_fx.model.state import AdapterState, names_in, root_of


def reset_adapters(
    model: nn.Module,
    adapter_names: str | Iterable[str] | None = None,
    *,
    device: torch.device | str | None = None,
) -> None:
    """Initialize adapters again as configured: vectors, anchors and trained copies.

    `transform` of a model on the meta device creates vectors without data. Call this function when the model has its
    weights (after `to_empty` and `load_state_dict`, or `load_state_dict(assign=True)`). With the same seed, the vectors
    equal those of `transform` and `add_adapter` on a model with weights, bit for bit. Trained copies
    (`modules_to_save`, `bias`) get the values of the base model.

    With `fully_shard`, call this in every process after `to_empty`. All processes use the random numbers of the first
    one, and keep their shard of the vectors.

    Args:
        model: a transformed model.
        adapter_names: the adapters; `None` for all, in the order in which they were added.
        device: where to create vectors that are still on the meta device. `None` uses the device of their layer.

    Raises:
        AdapterError: the model has no such adapter; an adapter is merged or has a scale other than 1; a layer is on the
            meta device and `device` is not set, or its vectors are sharded on the meta device; or accelerate offloads
            its trained copies. The model is unchanged.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(6, 4))
        >>> model = transform(model, HRAConfig(r=2, target_modules=["0"])).to_empty(device="cpu")
        >>> missing = model.load_state_dict(nn.Sequential(nn.Linear(6, 4)).state_dict(), strict=False)
        >>> reset_adapters(model)
        >>> bool((model[0].hra_u["default"][:, 0] == model[0].hra_u["default"][:, 1]).all())
        True
    """
    root, state = root_of(model)
    names = names_in(state, state.configs if adapter_names is None else adapter_names)
    load_vectors(root)
    base = {name: _base_values(root, name) for name in names}
    for name in names:
        check_replaceable(root, state, name)
        _check_device(root, name, base[name], device)
    with torch.inference_mode(False), random_numbers_of_first_rank(root.parameters()):
        for name in names:
            replace_values(root, name, _start_of(state, name), base[name], device)


def _start_of(state: AdapterState, name: str) -> Callable[[str, AdaptedLayer], tuple[Tensor, Tensor | None]]:
    """Return a function that draws the vectors of a layer as `transform` does."""

    def draw(path: str, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
        spec = dataclasses.replace(layer.hra_u.specs[name], init_weights=state.configs[name].init_weights)
        return layer.hra_u.initial(spec, householder.working_dtype(layer.hra_u[name].dtype))

    return draw


def _base_values(root: nn.Module, name: str) -> dict[tuple[str, str], Tensor]:
    """(path of a module, name of its tensor) -> the base model's value of each trained copy of an adapter."""
    return {
        (path, entry): copies.get(owner, BASE, entry)
        for path, (owner, copies) in all_copies(root).items()
        for entry in copies.copied.get(name, ())
    }


def _check_device(
    root: nn.Module, name: str, base: dict[tuple[str, str], Tensor], device: torch.device | str | None
) -> None:
    """Check that the device of vectors and copies on the meta device is known."""
    layers = layers_of(root, name) if device is None else {}
    without_data = [path for path, layer in layers.items() if layer.hra_u.device_of(layer).type == "meta"]
    without_data += [f"{path}.{entry}" for (path, entry), tensor in base.items() if tensor.is_meta]
    if without_data:
        raise AdapterError(
            f"{without_data[0]}: its weight is on the meta device. Call model.to_empty(device=...) or "
            "model.load_state_dict(..., assign=True) first, or pass the `device` for the vectors."
        )
