"""Models with adapters, and the steps in pairs by an oracle: sums and differences that are parameters themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from moe_models import call_of
from oracles import relative_error
from torch import Tensor, nn
from torch.func import functional_call

import hra_fx
from hra_fx import HRAConfig, train_pairs

C = 0.3
F64 = torch.float64
AdamW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


class HalfStep(torch.optim.RMSprop):
    """Goes half of the way."""

    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        before = [one.detach().clone() for one in group["params"]]
        super().step(closure)
        with torch.no_grad():
            for one, old in zip(group["params"], before, strict=True):
                one.lerp_(old, 0.5)


OPTIMIZERS: dict[str, Any] = {
    "AdamW": AdamW,
    "AdamW, fused": partial(AdamW, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.02),
    "Adagrad, which has a state before its first step": partial(torch.optim.Adagrad, lr=0.02),
    "a step around that of the base class": partial(HalfStep, lr=0.02),
}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(F64)


def adapted(model: nn.Module | None = None, **fields: Any) -> nn.Module:
    """With vectors off their start."""
    fields = {"r": 4, "target_modules": ["0", "2"]} | fields
    return off_start(hra_fx.transform(model or base(), HRAConfig(**fields)))


def off_start(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for vectors in vectors_of(model).values():
            vectors += 0.1 * torch.randn_like(vectors)
    return model


def vectors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: vectors for name, vectors in model.named_parameters() if ".hra_u." in name and vectors.requires_grad}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: vectors.detach().clone() for name, vectors in vectors_of(model).items()}


def loss_of(model: Any, step: int = 0, dtype: torch.dtype = F64) -> Any:
    torch.manual_seed(step)
    return model(torch.randn(8, 6, dtype=dtype)).square().mean()


def loss_of_experts(model: Any, step: int = 0) -> Any:
    return model(**call_of("mixtral")).logits.square().mean()


def vectors_from(m: Tensor, d: Tensor) -> Tensor:
    """The vectors, by their definition."""
    length = math.sqrt(m.shape[-2] / (3 * m.shape[-1]))
    pairs = [length * (m[..., i] + sign * C * d[..., i]) for i in range(m.shape[-1]) for sign in (1, -1)]
    return torch.stack(pairs, dim=-1)


def explicit_pairs(
    model: nn.Module, *, joint: bool = False
) -> tuple[list[nn.Parameter], Callable[[], dict[str, Tensor]]]:
    """Sums and differences that are parameters, and what gives the vectors; `joint` makes one parameter of both."""
    held: dict[str, list[nn.Parameter]] = {}
    for name, vectors in values_of(model).items():
        length = math.sqrt(vectors.shape[-2] * 2 / (3 * vectors.shape[-1]))
        a, b = vectors[..., ::2], vectors[..., 1::2]
        m, d = (a + b) / (2 * length), (a - b) / (2 * length * C)
        held[name] = [nn.Parameter(one) for one in ([torch.stack([m, d], -1).flatten(-2)] if joint else [m, d])]

    def now() -> dict[str, Tensor]:
        parts = {name: (one[0][..., ::2], one[0][..., 1::2]) if joint else one for name, one in held.items()}
        return {name: vectors_from(*both) for name, both in parts.items()}

    return [one for both in held.values() for one in both], now


def by_oracle(
    model: nn.Module, make: Any, loss: Any = loss_of, *, steps: int = 3, joint: bool = False
) -> dict[str, Tensor]:
    """The vectors after some steps of an optimizer whose parameters are sums and differences."""
    held, now = explicit_pairs(model, joint=joint)
    optimizer = make(held)
    for step in range(steps):
        optimizer.zero_grad()
        loss(lambda *args, **kwargs: functional_call(model, now(), args, kwargs), step).backward()
        optimizer.step()
    return now()


def by_pairs(model: nn.Module, make: Any, loss: Any = loss_of) -> dict[str, Tensor]:
    optimizer = make(vectors_of(model).values())
    train_pairs(optimizer, model, C)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return values_of(model)


def same(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert relative_error(actual[name], wanted[name].detach()) < tolerance, name
