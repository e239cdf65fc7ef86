"""A small model, its configuration, and a snapshot of everything that `transform` could change."""

from __future__ import annotations

import torch
from torch import nn

import hra_fx


def config(*targets: str, **fields: object) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**({"r": 3, "target_modules": list(targets)} | fields))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 4))


def picture(model: nn.Module) -> dict[str, object]:
    """Everything that `transform` could change, by identity."""
    return {
        "classes": [(path, type(module), id(module)) for path, module in model.named_modules()],
        "vars": [
            (path, key, id(value)) for path, module in model.named_modules() for key, value in vars(module).items()
        ],
        "modes": [module.training for module in model.modules()],
        "parameters": [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        "keys": list(model.state_dict()),
    }


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hra_u." in name:
                parameter.normal_()
