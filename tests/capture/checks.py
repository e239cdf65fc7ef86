"""What every test of capture needs: an adapted model, its oracle, and what plain fx would have made of the model."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from oracles import dense_product, dense_weight
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import hra_fx
from hra_fx.model.state import regions_of

TOLERANCE = 1e-10


def seed(value: int = 0) -> None:
    """Seed Python, numpy and torch alike."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def inputs(*shape: int, value: int = 7) -> Tensor:
    """Normal numbers in float64, the same for the same arguments."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(value))


def fresh(model: nn.Module, value: int = 1) -> nn.Module:
    """The model in float64 with parameters that do not depend on what ran before."""
    generator = torch.Generator().manual_seed(value)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2)
    return model


def turn(model: nn.Module, value: int = 2) -> None:
    """Give every reflection random vectors, so that the adapter does something."""
    generator = torch.Generator().manual_seed(value)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hra_u." in f".{name}":
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))


def adapt(model: nn.Module, targets: Any = r".*", r: int = 2) -> tuple[nn.Module, nn.Module]:
    """A transformed model with random vectors, and a copy of what it was before.

    `targets` as in `HRAConfig`; the default takes every Linear and Conv2d.
    """
    fresh(model)
    base = copy.deepcopy(model).requires_grad_(False)
    if targets == r".*":
        targets = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    hra_fx.transform(model, hra_fx.HRAConfig(r=r, target_modules=targets))
    turn(model)
    return model, base


def vectors(model: nn.Module) -> dict[str, Tensor]:
    """Layer path -> `U`, of every adapted layer."""
    found = {name: value for name, value in model.named_parameters() if ".hra_u." in f".{name}"}
    return {name.rpartition("hra_u.")[0].rstrip("."): value for name, value in found.items()}


def rotated(model: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """The oracle's weights, `W Q(U)` by an explicit product of matrices, differentiable in the `U` of `model`."""
    chains = vectors(model)
    assert chains
    return {
        f"{path}.weight": dense_weight(base.get_submodule(path).weight.detach(), dense_product(chain))
        for path, chain in chains.items()
    }


def oracle(model: nn.Module, base: nn.Module) -> nn.Module:
    """A copy of the base model that has the oracle's weights as its own."""
    plain = copy.deepcopy(base)
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, weight in rotated(model, base).items():
            weights[name].copy_(weight).requires_grad_()
    return plain


def assert_close(found: Any, expected: Any) -> None:
    """Equal structure, and every tensor equal to 1e-10 of the largest entry."""
    found_leaves, found_spec = pytree.tree_flatten(found)
    leaves, spec = pytree.tree_flatten(expected)
    assert found_spec == spec
    for a, b in zip(found_leaves, leaves, strict=True):
        if not isinstance(b, Tensor):
            assert a == b
            continue
        assert a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        if b.is_floating_point():
            assert torch.isfinite(b).all()
            assert (a - b).abs().max() <= TOLERANCE * b.abs().max().clamp(min=1.0)
        else:
            assert torch.equal(a, b)


def assert_equals_oracle(
    model: nn.Module, base: nn.Module, *args: Any, modes: tuple[bool | None, ...] = (True, False, True), **kwargs: Any
) -> None:
    """Outputs, gradients of every `U`, and buffers of both models after each call, in train and eval mode.

    Args:
        model: a transformed model.
        base: what it was before; both are called equally often, so whatever a call leaves behind must be equal too.
        args: of the call.
        modes: the modes to go through; `None` leaves the mode as it is.
        kwargs: of the call.
    """
    for step, mode in enumerate(modes):
        if mode is not None:
            model.train(mode)
            base.train(mode)
        seed(step)
        found = model(*args, **kwargs)
        seed(step)
        expected = torch.func.functional_call(base, rotated(model, base), args, kwargs)
        assert_close(found, expected)
        assert_close(_gradients(model, found), _gradients(model, expected))
        assert_close(dict(base_buffers(model)), dict(base_buffers(base)))


def _gradients(model: nn.Module, output: Any) -> list[Tensor]:
    outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not outputs:
        return []
    chains = list(vectors(model).values())
    for chain in chains:
        chain.grad = None
    # backward, as a training step does: a reentrant checkpoint refuses torch.autograd.grad.
    sum((leaf * inputs(*leaf.shape, value=9)).sum() for leaf in outputs).backward()
    return [torch.zeros_like(chain) if chain.grad is None else chain.grad for chain in chains]


def base_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are not the reflections' own."""
    return ((name, value) for name, value in model.named_buffers() if ".hra_u." not in f".{name}")


def reasons(model: nn.Module) -> str:
    """Every reason of the report, a line each."""
    return "\n".join(row.region_reason for row in hra_fx.report(model).rows)


def assert_refused(model: nn.Module, reason: str) -> None:
    """No region spans the model, and the report says why."""
    rows = hra_fx.report(model).rows
    assert rows and all(row.region != "whole" for row in rows)
    assert reason in reasons(model)


def assert_whole(model: nn.Module) -> None:
    """The model is one region, from its root."""
    rows = hra_fx.report(model).rows
    assert rows and all(row.region == "whole" and row.region_reason == "" for row in rows), reasons(model)


def naive(model: nn.Module, **options: Any) -> fx.GraphModule:
    """What plain fx makes of a copy of the model in the mode that it is in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wonders at proxies, and goes on
        graph: fx.GraphModule = fx.symbolic_trace(copy.deepcopy(model), **options)
    return graph


def differ(found: Any, expected: Any) -> bool:
    """Whether two results differ in any tensor, or in whether it has a gradient."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
    return any(a.shape != b.shape or a.requires_grad != b.requires_grad or not torch.allclose(a, b) for a, b in pairs)


class Spy:
    """Counts the runs of a model's compiled graphs, by standing in their place (`Region._programs`)."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap every graph of every region of `model` that was compiled so far."""
        self.runs = 0
        for carrier in regions_of(model).values():
            programs = carrier._hra_region._programs
            for training, program in list(programs.items()):
                programs[training] = self._counting(program)

    def _counting(self, program: Any) -> Any:
        def run(*args: Any) -> Any:
            self.runs += 1
            return program(*args)

        return run


def spied(model: nn.Module, *args: Any, **kwargs: Any) -> Spy:
    """A spy over all graphs, which two calls (train and eval) have compiled; the mode stays as it is."""
    before: Mapping[str, bool] = {name: part.training for name, part in model.named_modules()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    for mode in (True, False):
        seed()
        with torch.no_grad():
            model.train(mode)(*args, **kwargs)
    for name, part in model.named_modules():
        part.training = before[name]
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    return Spy(model)
