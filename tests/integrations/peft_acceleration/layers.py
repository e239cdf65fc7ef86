"""PEFT's HRA in small models with random vectors, and the dense oracle for it."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from adapting import randomise
from one_layer import upstream_for
from oracles import dense_q, dense_weight
from peft_sides import peft_warnings_ignored
from torch import Tensor, nn

import hra_fx


def adapted(base: nn.Module, *names: str, adapter: str = "default", **fields: Any) -> Any:
    """A copy of `base` with PEFT's HRA in the layers of these names."""
    config = peft.HRAConfig(**({"r": 4, "init_weights": False, "target_modules": list(names)} | fields))
    with peft_warnings_ignored():
        return peft.get_peft_model(copy.deepcopy(base), config, adapter_name=adapter)


def accelerated(base: nn.Module, *names: str, **fields: Any) -> Any:
    """As `adapted`, made while `accelerate_peft` acts; its layers stay accelerated."""
    with hra_fx.accelerate_peft():
        model = adapted(base, *names, **fields)
        hra_fx.accelerate_peft(model)
    return model


def one_layer(base: nn.Module, **fields: Any) -> Any:
    """An accelerated layer of PEFT over a copy of `base`, with random vectors in the dtype of the base."""
    model = accelerated(nn.Sequential(base), "0", **fields)
    randomise(model)
    layer = model.base_model.model[0]
    return layer.to(base.weight.dtype) if base.weight.dtype == torch.float64 else layer


def results(layer: Any, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and vectors."""
    x = x.detach().clone().requires_grad_()
    vectors = list(layer.hra_u.values())
    output = layer(x)
    return [output, *torch.autograd.grad(output, [x, *vectors], upstream_for(output))]


def dense_results(layer: Any, x: Tensor) -> list[Tensor]:
    """The same of the base layer with the weight `W Q`, in float64."""
    base = layer.base_layer
    x = x.detach().double().requires_grad_()
    leaves = {name: layer.hra_u[name].detach().double().requires_grad_() for name in layer.active_adapters}
    weight = base.weight.detach().double()
    for name, vectors in leaves.items():
        weight = dense_weight(weight, dense_q(vectors, apply_GS=layer.hra_apply_GS[name]))
    output = torch.func.functional_call(copy.deepcopy(base).double(), {"weight": weight}, (x,))
    return [output, *torch.autograd.grad(output, [x, *leaves.values()], upstream_for(output))]
