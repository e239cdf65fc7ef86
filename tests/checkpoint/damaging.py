"""Adapters in folders, ways to damage them, and a check that a failed load leaves the model unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapting import config, mlp, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hra_fx

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def saved(folder: Path, *targets: str, base: Callable[[], nn.Module] = mlp, **fields: Any) -> Path:
    """Save an adapter of `base` with random vectors; `fields` are those of its configuration."""
    model = hra_fx.transform(base(), config(*targets, **fields))
    randomise(model)
    hra_fx.save_adapter(model, folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_NAME)


def with_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Return a function that edits the tensors in a folder; `change` edits their dict."""

    def damage(folder: Path) -> None:
        tensors = weights(folder)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_NAME)

    return damage


def with_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return damage


#: Models into which the damaged adapter is loaded. The argument is the folder of the undamaged one.
MODELS: dict[str, Callable[[Path], nn.Module]] = {
    "plain": lambda folder: mlp(),
    "beside": lambda folder: hra_fx.transform(mlp(), config("0", r=2), "other"),
    "replacing": lambda folder: hra_fx.load_adapter(mlp(), folder, is_trainable=True),
}
