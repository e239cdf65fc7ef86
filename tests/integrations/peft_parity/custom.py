"""Two small models of the kind that PEFT is tried on, and what they compute: the base model over dense `W Q`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from oracles import dense_q, dense_weight
from torch import Tensor, nn

import hra_fx


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.drop(self.relu(self.lin0(x))))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(6, 4, 1, bias=False)
        self.flat = nn.Flatten()
        self.lin0 = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.flat(self.conv1(self.relu(self.conv0(x)))))


@dataclass(frozen=True)
class Case:
    kind: type[nn.Module]
    fields: dict[str, Any]
    shape: tuple[int, ...]

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        return self.kind().to(dtype).eval()

    def x(self, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def model(self, dtype: torch.dtype = torch.float32, adapter_name: str = "default", seed: int = 3) -> Any:
        """An adapted model at random vectors."""
        model = hra_fx.HRAModel(self.base(dtype), hra_fx.HRAConfig(**self.fields), adapter_name)
        return randomised(model, adapter_name, seed)


def mlp(**fields: Any) -> Case:
    return Case(MLP, {"r": 4} | fields, (5, 10))


def conv(**fields: Any) -> Case:
    return Case(Conv, {"r": 4} | fields, (2, 3, 4, 4))


CASES = {
    "lin0": mlp(target_modules="lin0"),
    "lin0 in a list": mlp(target_modules=["lin0"]),
    "lin1": mlp(target_modules=["lin1"]),
    "both": mlp(target_modules=["lin0", "lin1"]),
    "odd": mlp(target_modules=["lin0", "lin1"], r=3),
    "GS": mlp(target_modules=["lin0", "lin1"], apply_GS=True),
    "GS, random": mlp(target_modules=["lin0"], apply_GS=True, init_weights=False),
    "saved": mlp(target_modules=["lin0"], modules_to_save=["lin1"]),
    "excluded": mlp(target_modules=["lin0", "lin1"], exclude_modules=["lin0"]),
    "conv0": conv(target_modules=["conv0"]),
    "convs": conv(target_modules=["conv0", "conv1"], r=2),
    "conv and linear": conv(target_modules=["conv0", "lin0"], init_weights=False),
    "conv, GS": conv(target_modules=["conv0", "lin0"], apply_GS=True, r=3),
    "conv, saved": conv(target_modules=["conv0"], modules_to_save=["lin0"], r=5),
}


def randomised(model: Any, adapter_name: str, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith(f".hra_u.{adapter_name}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def dense(base: nn.Module, model: nn.Module, x: Tensor, names: Iterable[str] = ("default",)) -> Tensor:
    """What the base model gives in float64 over `W Q_a Q_b ...`, each `Q` a dense product of reflections.

    Where the adapter trains a module in full, the model has the trained tensor in place of the base model's.
    """
    base = copy.deepcopy(base).double()
    state = {key: value.detach() for key, value in model.state_dict().items()}
    for path, layer in base.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        with torch.no_grad():
            for tensor, own in layer.named_parameters():
                if f"{path}.hra_saved.base_layer.{tensor}" in state:
                    own.copy_(state[f"{path}.{tensor}"])
            for name in names:
                vectors = state.get(f"{path}.hra_u.{name}")
                if vectors is not None:
                    gs = model.peft_config[name].apply_GS
                    q = dense_q(vectors, apply_GS=gs, anchor=state.get(f"{path}.hra_u.{name}_anchor"))
                    layer.weight.copy_(dense_weight(layer.weight, q))
    return base(x.double()).detach()
