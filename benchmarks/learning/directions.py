"""Protection of LoRA, and other choices of directions than those of `hra_fx.protect`, for comparison.

The directions come from the exact second moments of the inputs of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: From the second moments `(d, d)` of the inputs of a layer to directions `(d, k)`.
Choice = Callable[[Tensor], Tensor]


def top(count: int) -> Choice:
    """The directions with most of the energy."""
    return lambda moments: torch.svd_lowrank(moments, q=2 * count, niter=6)[0][:, :count]


def of_energy(share: float, at_least: int = 1) -> Choice:
    """As many main directions as hold a share of the energy."""

    def choose(moments: Tensor) -> Tensor:
        energy, vectors = torch.linalg.eigh(moments)
        parts = energy.flip(0).clamp_min(0).cumsum(0)
        count = int((parts < share * parts[-1]).sum()) + 1
        return vectors.flip(1)[:, : max(count, at_least)]

    return choose


@torch.no_grad()
def main_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], choose: Choice
) -> dict[str, Tensor]:
    """Directions of the inputs of each layer: path -> `(d, k)`. The adapters of the model must not act yet."""
    sums: dict[str, Any] = dict.fromkeys(layers, 0.0)

    def reader(path: str) -> Callable[..., None]:
        def read(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = inputs_of(layer, args[0].detach().float())
            sums[path] = sums[path] + rows.T @ rows

        return read

    hooks = [layer.register_forward_pre_hook(reader(path)) for path, layer in layers.items()]
    for batch in batches:
        model(**batch) if isinstance(batch, dict) else model(batch)
    for hook in hooks:
        hook.remove()
    return {path: choose(moments) for path, moments in sums.items()}


def inputs_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows that the weight of a layer is multiplied with; the patches of a convolution."""
    base: Any = getattr(layer, "base_layer", layer)
    if not isinstance(base, nn.Conv2d):
        return x.flatten(0, -2)
    size = base.kernel_size, base.dilation, base.padding, base.stride
    return nn.functional.unfold(x, *size).mT.flatten(0, 1)


def keep_orthogonal(optimizer: torch.optim.Optimizer, project: Callable[[], None]) -> None:
    """Project now, and after each step."""
    with torch.no_grad():
        project()

    @torch.no_grad()
    def after(*_: Any) -> None:
        project()

    optimizer.register_step_post_hook(after)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with LoRA, by path."""
    return {path: layer for path, layer in model.named_modules() if "default" in getattr(layer, "lora_A", {})}


def hra_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with reflections, by path."""
    return {path: layer for path, layer in model.named_modules() if "default" in getattr(layer, "hra_u", {})}


def protect_lora(optimizer: torch.optim.Optimizer, model: nn.Module, bases: Mapping[str, Tensor]) -> None:
    """Keep the rows of LoRA's `A` orthogonal to directions of the inputs, so that `B A x = 0` for them."""
    held = [(layer.lora_A["default"].weight, bases[path]) for path, layer in lora_layers(model).items()]

    def project() -> None:
        for down, basis in held:
            rows = down.flatten(1)
            down.copy_((rows - (rows @ basis) @ basis.T).view_as(down))

    keep_orthogonal(optimizer, project)


def protect_hra(optimizer: torch.optim.Optimizer, model: nn.Module, bases: Mapping[str, Tensor]) -> None:
    """What `hra_fx.protect` does, with other directions."""
    held = [(layer.hra_u["default"], bases[path]) for path, layer in hra_layers(model).items()]

    def project() -> None:
        for vectors, basis in held:
            vectors -= basis @ (basis.T @ vectors)

    keep_orthogonal(optimizer, project)


@torch.no_grad()
def start_in_low_directions(model: nn.Module, share: float = 0.1) -> None:
    """Start the pairs of vectors in the directions with the smallest singular values of the weight."""
    for layer in hra_layers(model).values():
        vectors, weight = layer.hra_u["default"], layer.weight.flatten(1).float()
        low = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, : int(share * weight.shape[1])]
        start = low @ torch.randn(low.shape[1], vectors.shape[1] // 2)
        start *= vectors[:, 0::2].norm(dim=0) / start.norm(dim=0)
        vectors.copy_(start.repeat_interleave(2, dim=1))
