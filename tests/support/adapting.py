"""A small model, its configuration, and a snapshot of everything that `transform` could change; its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hra_fx
from hra_fx.errors import HRAError, UnsupportedLayerError

#: torch warns of its own copies of tree specifications, in saving and in run_decompositions.
QUIET = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


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


def vectors_of(model: nn.Module, adapter: str = "") -> dict[str, nn.Parameter]:
    """Name -> vectors, of all adapters or of one."""
    ending = f".{adapter}" if adapter else ""
    return {name: p for name, p in model.named_parameters() if ".hra_u." in name and name.endswith(ending)}


def randomise(model: nn.Module, adapter: str = "", *, seed: int = 1) -> None:
    """Random vectors, far from the start, for all adapters or for one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vectors in vectors_of(model, adapter).values():
            vectors.normal_(generator=generator)


def adapted(model: nn.Module, *targets: str, **fields: Any) -> Any:
    """The model after `transform`, at random vectors."""
    made = hra_fx.transform(model, config(*targets, **fields))
    randomise(made)
    return made


def refused(model: nn.Module, settings: hra_fx.HRAConfig, kind: type[HRAError] = UnsupportedLayerError) -> str:
    """The message of the error. The model must be unchanged."""
    before = picture(model)
    with pytest.raises(kind) as caught:
        hra_fx.transform(model, settings)
    assert picture(model) == before
    return str(caught.value)
