"""`load_adapter`: load an adapter saved by hra_fx or PEFT into a plain or a transformed model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hra_fx.api.pretrained import root_class_for
from hra_fx.checkpoint.adapter import fit
from hra_fx.checkpoint.folder import find
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.functional import householder
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.sharding import device_of_values
from hra_fx.model.reset import layers_of, replace_adapter
from hra_fx.model.setup import put_adapter, valid_config
from hra_fx.model.state import get_state, is_adapted, root_of
from hra_fx.model.whole import check_whole

M = TypeVar("M", bound=nn.Module)
#: Options of PEFT's `load_adapter`: new values in place, vectors in float32, in little memory, on the model's device.
_ALWAYS = ("autocast_adapter_dtype", "ephemeral_gpu_offload", "hotswap", "low_cpu_mem_usage", "torch_device")


def load_adapter(
    model: M,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    subfolder: str | None = None,
    config: HRAConfig | None = None,
    **hub: Any,
) -> M:
    """Load an adapter saved by `save_adapter`, `save_pretrained` or PEFT. Pickle files are never read.

    A plain model is transformed, and the adapter is active. In a transformed model, a new adapter is inactive until you
    call `set_adapter`; an existing adapter with this name gets new values in place. Both files are read and checked
    before the model is changed. For a graph, first call `transform(model, HRAConfig.from_pretrained(directory),
    trace=True)`.

    Args:
        model: the base model, or a transformed model.
        directory: the folder with both files, or the name of a Hub repository.
        adapter_name: name of the adapter in this model.
        is_trainable: whether the adapter can be trained. Otherwise the model is put into eval mode, as in PEFT.
        subfolder: path of the adapter in `directory`.
        config: replaces the configuration in the folder.
        hub: passed to `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir` and others. Options of
            PEFT's `load_adapter` for what is always done here, such as `hotswap`, are ignored.

    Returns:
        `model`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model; the message names the file and the key.
        ConfigError: the configuration is invalid.
        AdapterError: the model has an adapter with this name and another configuration, adapters are merged, or
            accelerate offloads trained copies.
        UnsupportedLayerError: see `transform`. After any error the model is unchanged.
        TypeError: an unknown keyword argument.

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
    # Tensors created in inference mode could never be trained.
    with torch.inference_mode(False):
        plain = isinstance(model, nn.Module) and not any(
            get_state(part) or is_adapted(part) for part in model.modules()
        )
        root, state = (model, None) if plain else root_of(model)
        if state is not None:
            check_whole(root, "load an adapter")
        folder = find(directory, subfolder, **{name: value for name, value in hub.items() if name not in _ALWAYS})
        is_new = state is None or adapter_name not in state.configs
        fitted = fit(folder, root, config, is_new=is_new, is_trainable=is_trainable)
        config = valid_config(fitted.config)

        def fill(path: str, layer: nn.Module, reflection: HouseholderAdapters) -> None:
            """Cast as PEFT does (`autocast_adapter_dtype`): at least float32, and at least the layer's dtype."""
            vectors = fitted.vectors[path]
            is_wide = vectors.dtype == torch.float64
            dtype = vectors.dtype if is_wide else householder.working_dtype(reflection.weight_of(layer).dtype)
            device = device_of_values(reflection.device_of(layer))
            reflection.put(adapter_name, fitted.spec(path), vectors.to(device, dtype))

        if state is not None and adapter_name in state.configs:
            trained = layers_of(root, adapter_name).values() if is_trainable else ()
            if any(layer.hra_u.specs[adapter_name].pairs for layer in trained):
                _check_run(folder)
            values = fitted.vectors, fitted.copies
            replace_adapter(root, adapter_name, fitted.config.apply_GS, *values, is_trainable=is_trainable)
        else:
            new: Any = {"root_class": root_class_for(root), "layers": fitted.layers}
            put_adapter(root, adapter_name, config, fill, fitted.copies, **new)
    if not is_trainable:
        model.eval()
    return model


def _check_run(folder: Path) -> None:
    """Refuse a checkpoint of the Trainer that was written without pairs, because its optimizer would not fit."""
    if (folder / "optimizer.pt").exists() and not (folder / "model.safetensors").exists():
        raise AdapterError(
            f"{folder} is a checkpoint of a run that trained vectors, and the state of its optimizer does not fit the "
            f"pairs that this adapter trains. Delete {folder / 'optimizer.pt'} to go on with a new state."
        )
