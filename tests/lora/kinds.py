"""Models with one adapted layer of each kind that LoRA supports, and the dense and the exported change of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracles import dense_power, layer_q
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hra_fx

F64 = torch.float64

KINDS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(12, 9),
    "a wide Linear": lambda: nn.Linear(12, 2, bias=False),
    "Conv1D": lambda: Conv1D(9, 12),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "Conv2d": lambda: nn.Conv2d(3, 6, (2, 3), stride=(2, 1), padding=(0, 2)),
    "Conv2d, same": lambda: nn.Conv2d(3, 6, 3, padding="same"),
    "Conv3d": lambda: nn.Conv3d(2, 5, (1, 2, 3)),
}


def move(model: nn.Module, seed: int, size: float = 0.3) -> None:
    """Add noise to all trainable parameters, also biases and copies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(size * noise * (parameter.std() + 0.1 if parameter.numel() > 1 else 1))


def product(layer: Any, names: list[str]) -> Tensor:
    """`Q` of some adapters of a layer, in their order, in float64."""
    q = torch.eye(layer.hra_u.width, dtype=F64)
    for name in names:
        q = q @ dense_power(layer_q(layer, [name]).detach(), layer.hra_u.scales.get(name, 1.0))
    return q


def dense_change(layer: Any, names: list[str]) -> Tensor:
    """`W Q - W: (out, d)` in float64."""
    weight = layer.hra_base.detach().double()
    rows = weight.mT if layer.hra_u.fan_in_fan_out else weight.flatten(1)
    return rows @ (product(layer, names) - torch.eye(rows.shape[1], dtype=F64))


def exported_change(tensors: dict[str, Tensor], path: str) -> Tensor:
    """`B A: (out, d)` of a layer, in float64."""
    A, B = (tensors[f"base_model.model.{path}.lora_{name}.weight"].double() for name in "AB")
    return B.flatten(1) @ A.flatten(1)


def adapted(kind: str, *configs: hra_fx.HRAConfig, seed: int = 0) -> nn.Module:
    """A model with one layer, "0", and active adapters "a", "b", ... with noise."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(KINDS[kind]())
    names = "abcdef"[: len(configs)]
    for name, config in zip(names, configs, strict=True):
        add = hra_fx.transform if name == "a" else hra_fx.add_adapter
        arguments = (config, name) if name == "a" else (name, config)
        add(model, *arguments)
        hra_fx.set_adapter(model, name)
        move(model, seed + ord(name))
    hra_fx.set_adapter(model, list(names))
    return model
