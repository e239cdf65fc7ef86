"""`load_adapter`: an adapter that hra_fx or PEFT wrote, into a plain or a transformed model."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hra_fx.api.transform import checked, set_up
from hra_fx.checkpoint.fitting import Fitted, fit
from hra_fx.checkpoint.folder import find
from hra_fx.compat import non_persistent_buffers
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.functional import householder
from hra_fx.layers.adapters import Reflection
from hra_fx.layers.sharding import laid_out_as, reshard
from hra_fx.layers.trained_copies import Copies, copies_of
from hra_fx.model.add import put_beside
from hra_fx.model.defer_interrupt import uninterrupted
from hra_fx.model.example_inputs import as_call
from hra_fx.model.offload import require_present
from hra_fx.model.state import Record, inventory, record_of, root_of, sites_of
from hra_fx.model.trainable import give_gradients

M = TypeVar("M", bound=nn.Module)


def load_adapter(
    model: M,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    subfolder: str | None = None,
    config: HRAConfig | None = None,
    example_inputs: Any = None,
    **hub: Any,
) -> M:
    """Load an adapter that `save_adapter`, `save_pretrained` or PEFT wrote. Nothing is ever unpickled.

    Into a plain model: it is transformed, and the adapter acts. Into a transformed one: the adapter comes beside the
    others, and does not act before `set_adapter`; if the model has it already, its values are replaced in place. Both
    files are read and checked against the model before it is touched, and no vectors are drawn only to be overwritten.

    Args:
        model: the base model, or a transformed model.
        directory: the folder with both files, or the name of a repository on the Hub.
        adapter_name: what to call it here.
        is_trainable: whether it is to be trained on, where it acts; otherwise the model is put into eval mode, as PEFT
            does.
        subfolder: where in `directory` the files are.
        config: goes in place of the configuration in the folder.
        example_inputs: as for `transform`, where the model is plain.
        hub: for `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir` and others.

    Returns:
        `model`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model; it names the file and the key.
        ConfigError: the configuration is broken.
        AdapterError: the model has an adapter of that name with another configuration, or adapters are merged, or
            accelerate offloads it.
        UnsupportedLayerError: as `transform`. After any error the model is as it was.

    Example:
        >>> import tempfile
        >>> from hra_fx import HRAConfig, save_adapter, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     other = load_adapter(nn.Sequential(nn.Linear(6, 4)), folder, "mine")
        >>> bool((other[0].hra_u["mine"] == model[0].hra_u["default"]).all())
        True
    """
    # Vectors made in inference mode could never be trained.
    with torch.inference_mode(False):
        call = None if example_inputs is None else as_call(example_inputs)
        plain = isinstance(model, nn.Module) and not any(record_of(part) for part in model.modules())
        root, record = (model, None) if plain else root_of(model)
        if record is not None:
            require_present(root)
        fitted = fit(find(directory, subfolder, **hub), root, config)
        config = checked(root, dataclasses.replace(fitted.config, inference_mode=not is_trainable), adapter_name)

        def fill(path: str, layer: nn.Module, reflection: Reflection) -> None:
            vectors, anchor = fitted.vectors[path]
            weight = reflection.weight_of(layer)
            anchored = None if anchor is None else _like(anchor, weight)
            reflection.put(adapter_name, fitted.spec, _like(vectors, weight), anchored)

        if record is None:
            set_up(root, config, adapter_name, fill, fitted.copies, call=call)
        elif adapter_name in record.configs:
            _replace(root, record, adapter_name, fitted, is_trainable)
        else:
            put_beside(root, record, adapter_name, config, fill, fitted.copies)
    if not is_trainable:
        model.eval()
    return model


def _replace(root: nn.Module, record: Record, name: str, fitted: Fitted, is_trainable: bool) -> None:
    """New values for an adapter, in the parameters that an optimizer may hold."""
    if name in record.merged:
        raise AdapterError(f"adapter {name!r}: it is merged into the weights. Call unmerge_adapter first.")
    if any(name in reflection.scales for reflection in inventory(root).reflections):
        raise AdapterError(f"adapter {name!r}: its strength is not 1. Call hra_fx.set_scale(model, {name!r}, 1) first.")
    layers = {path: layer for path, layer in sites_of(root).items() if name in layer.hra_u}
    spec = next(iter(layers.values())).hra_u.specs[name]
    ways = ((fitted.vectors, fitted.spec.apply_GS), (fitted.written, fitted.written_GS))
    shapes = {path: layer.hra_u[name].shape for path, layer in layers.items()}
    values = next(
        (new for new, gs in ways if gs is spec.apply_GS and {path: u.shape for path, (u, _) in new.items()} == shapes),
        None,
    )
    held = {(path, entry) for path, (owner, copies) in copies_of(root).items() for entry in _saved(owner, copies, name)}
    if values is None or held != fitted.copies.keys():
        raise AdapterError(
            f"adapter {name!r}: the model has it with other layers, rank, Gram-Schmidt, biases or modules to save than "
            "the file. Delete it first (hra_fx.delete_adapter), or load under another name."
        )
    reshard(root)
    with torch.no_grad(), uninterrupted():
        for path, layer in layers.items():
            layer.hra_u.replace(name, *values[path], layer.hra_base.device)
        for path, (owner, copies) in copies_of(root).items():
            for entry in _saved(owner, copies, name):
                own = copies.get(owner, name, entry)
                own.copy_(laid_out_as(fitted.copies[path, entry], own))
    record.configs[name].inference_mode = not is_trainable
    give_gradients(inventory(root), (name,), is_trainable and name in record.active)


def _saved(owner: nn.Module, copies: Copies, name: str) -> list[str]:
    return [entry for entry in copies.copied.get(name, ()) if entry not in non_persistent_buffers(owner)]


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    """As PEFT does (`autocast_adapter_dtype`): float32 at least, and as wide as the layer."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else householder.working_dtype(weight.dtype)
    return tensor.to(weight.device, dtype)
