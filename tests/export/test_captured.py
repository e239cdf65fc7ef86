"""Which values are programs, which are graphs of operators, and how those are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from export.programs import capture, config, mixed
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import hra_fx
from hra_fx.export.captured import is_captured


def test_is_captured() -> None:
    model, ids = mixed()
    assert is_captured(capture(model, ids).module())
    assert is_captured(make_fx(nn.Linear(2, 2))(torch.ones(1, 2)))
    assert not is_captured(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))
    assert not is_captured(model)


@pytest.mark.parametrize(
    "function",
    [lambda module: hra_fx.transform(module, config("head")), hra_fx.fold, hra_fx.report, hra_fx.lower, hra_fx.freeze],
    ids=["transform", "fold", "report", "lower", "freeze"],
)
def test_a_module_of_operators_is_refused_and_stays_as_it_was(function: Callable[[Any], Any]) -> None:
    model, ids = mixed()
    module = capture(model, ids).module()
    code, keys = module.code, list(module.state_dict())
    with pytest.raises(hra_fx.AdapterError, match=r"consists of operators, .* Pass the Exp.* hra_fx\.lift"):
        function(module)
    assert (module.code, list(module.state_dict())) == (code, keys)
    assert all(parameter.requires_grad for parameter in module.parameters())
