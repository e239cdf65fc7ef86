"""Small models for `transform(..., verify=True)`, and a check that a refusal changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.many import normal
from refusals import picture
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import VerificationError

X = normal(4, 6)
IMAGES = normal(3, 3, 8, 8)


def fresh(model: nn.Module) -> nn.Module:
    """The model in float64 with parameters that do not depend on what ran before."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2)
    return model


class Two(nn.Module):
    """Two layers 6 -> 6 and a branch on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.tanh(self.first(x))) if float(x.detach().sum()) < 1e9 else x


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 6, 3, padding=1, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, groups=2, dilation=2, padding="same", padding_mode="reflect"),
            nn.Dropout2d(0.3),
        )
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x).mean(dim=(2, 3))
        return self.second(nn.functional.dropout(self.first(hidden), 0.2, self.training))


def targets(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]


def verified(model: nn.Module, example: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = hra_fx.HRAConfig(**({"r": 2, "target_modules": targets(model)} | fields))
    return hra_fx.transform(model, config, example_inputs=example, verify=True)


def refused(model: nn.Module, example: Any, kind: Any = VerificationError, **fields: Any) -> str:
    before, state = picture(model), torch.get_rng_state()
    with pytest.raises(kind) as caught:
        verified(model, example, **fields)
    assert picture(model) == before
    torch.set_rng_state(state)
    return str(caught.value)
