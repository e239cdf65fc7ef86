"""An error of `transform`, and a check that the model is unchanged."""

from __future__ import annotations

import pytest
from adapting import picture
from torch import nn

import hra_fx
from hra_fx.errors import HRAError, UnsupportedLayerError


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def refused(model: nn.Module, settings: hra_fx.HRAConfig, kind: type[HRAError] = UnsupportedLayerError) -> str:
    """The message of the error. The model must be unchanged."""
    before = picture(model)
    with pytest.raises(kind) as caught:
        hra_fx.transform(model, settings)
    assert picture(model) == before
    return str(caught.value)
