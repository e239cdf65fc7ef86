r"""`allocate_ranks`: ranks of layers from a budget of parameters, by the gradient at the base model.

At `Q = I`, moving `Q` by `exp(t S)` with a skew-symmetric `S` changes the loss by `t <G, W S>`, with `G` the gradient
of the weight `W`. So the steepest rotation is along `W^T G - G^T W`. Its singular values come in pairs, one pair for
each plane: `sigma_i` is the slope of the loss along the angle of the `i`-th steepest plane. A pair of reflections
rotates one plane, and has `2 d` parameters. Pairs go to the layers with the largest `sigma_i^2 / (2 d)`.
"""

from __future__ import annotations

import dataclasses
import heapq
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, ConfigError, UnsupportedLayerError
from hra_fx.functional.rotate import as_rows
from hra_fx.layers.target import has_columns, kind_of, weight_name, width_of
from hra_fx.model.setup import valid_config
from hra_fx.selection.check import check
from hra_fx.selection.select import select

#: The largest rank of a layer, in multiples of the rank that all layers would have.
_MOST = 4


def allocate_ranks(
    model: nn.Module,
    config: HRAConfig,
    example_batches: Iterable[Any],
    budget: int,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> HRAConfig:
    """Choose the ranks of the layers for a number of parameters, from the gradients of one pass over some batches.

    The ranks are even, at least 2, and at most four times the rank that all layers could have. The gradients of the
    selected weights are held in memory; the model is not changed.

    It helps where few layers have to turn: in networks whose target differs by a rotation of one layer, the loss after
    training is 0.0 to 0.6 times that of equal ranks. On MiniLM and 20 Newsgroups (640 texts, 36 layers, parameters of
    r=4, three seeds) it is no better than equal ranks: mean accuracy 64.1 % for both, mean held-out loss 1.170 against
    1.176. Compare with equal ranks before you rely on it.

    Args:
        model: a plain model, in the mode in which the gradients are wanted.
        config: which layers; its `r` and `rank_pattern` are replaced.
        example_batches: tensors, tuples of positional or dictionaries of keyword arguments.
        budget: the number of parameters of all reflection vectors, the sum of `d * r`.
        loss: called with the output and the batch, returns a scalar; `None`: the output's `loss`.

    Returns:
        A configuration with a `rank_pattern` that uses the budget, less what no layer has use for.

    Raises:
        ConfigError: the budget is too small for two vectors in each layer.
        AdapterError: there are no batches, or no gradient reaches any of the layers.
        SelectionError, UnsupportedLayerError: as `transform`; weights without values, such as quantized ones, have no
            gradient.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> config = HRAConfig(target_modules=["0", "2"])
        >>> mean = lambda output, batch: output.square().mean()
        >>> chosen = allocate_ranks(model, config, [torch.ones(4, 8)], budget=64, loss=mean)
        >>> sum(8 * chosen.rank_of(path) for path in ("0", "2"))
        64
    """
    config = valid_config(config)
    layers = select(model, config)
    check(model, layers, config)
    widths = {path: width_of(layer) for path, layer in layers.items()}
    least = 2 * sum(widths.values())
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < least:
        raise ConfigError(
            f"`budget` must be an int >= {least}, for two vectors in each of the {len(layers)} layers, got {budget!r}."
        )
    most = {path: min(width, _MOST * budget // (sum(widths.values())) // 2 * 2) for path, width in widths.items()}
    slopes = {
        path: _slopes(layers[path], gradient, most[path])
        for path, gradient in _gradients(model, layers, example_batches, loss).items()
    }
    ranks = _spend(widths, slopes, most, budget)
    # The longer paths first: a path also matches longer ones that end like it.
    pattern = {re.escape(path): ranks[path] for path in sorted(ranks, key=len, reverse=True)}
    return dataclasses.replace(config, r=2, rank_pattern=pattern)


def _gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None
) -> dict[str, Tensor]:
    """The sum of the gradients of the weights over the batches."""
    weights: dict[str, Any] = {path: layer._parameters[weight_name(kind_of(layer))] for path, layer in layers.items()}
    for path, weight in weights.items():
        if not weight.is_floating_point():
            raise UnsupportedLayerError(f"{path}: its weight is quantized, and has no gradient. Set `rank_pattern`.")
    flags = {path: weight.requires_grad for path, weight in weights.items()}
    total: dict[str, Tensor] = {}
    seen = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            seen += 1
            with torch.enable_grad():
                output = _call(model, batch)
                value = output.loss if loss is None else loss(output, batch)
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for path, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    total[path] = total[path] + gradient if path in total else gradient
    finally:
        for path, weight in weights.items():
            weight.requires_grad_(flags[path])
    if not total:
        raise AdapterError(f"no gradient reaches any of the layers in {seen} batches, so ranks cannot be chosen.")
    return total


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _slopes(layer: nn.Module, gradient: Tensor, most: int) -> list[float]:
    """The slopes of the loss along the steepest planes of a layer, the largest first."""
    columns, weight = has_columns(layer), layer._parameters[weight_name(kind_of(layer))]
    assert weight is not None
    rows, slope = (as_rows(tensor.detach(), transposed=columns).float() for tensor in (weight, gradient))
    inner = rows.mT @ slope
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same ranks each time
        _, values, _ = torch.svd_lowrank(inner - inner.mT, q=most)
    return [float(value) for value in values[::2].cpu()]


def _spend(
    widths: Mapping[str, int], slopes: Mapping[str, list[float]], most: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Pairs of vectors for the largest gain per parameter, after one pair for each layer."""
    ranks = dict.fromkeys(widths, 2)
    left = budget - 2 * sum(widths.values())
    queue: list[tuple[float, str]] = []

    def offer(path: str) -> None:
        pair = ranks[path] // 2
        if pair < len(slopes.get(path, ())) and ranks[path] + 2 <= most[path]:
            heapq.heappush(queue, (-(slopes[path][pair] ** 2) / widths[path], path))

    for path in ranks:
        offer(path)
    while queue:
        _, path = heapq.heappop(queue)
        if 2 * widths[path] <= left:
            left -= 2 * widths[path]
            ranks[path] += 2
            offer(path)
    return ranks
