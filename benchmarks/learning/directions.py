"""Protection of LoRA, for comparison: the rows of its `A` stay orthogonal to the main directions of the inputs.

The directions come from the exact second moments of the inputs of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with LoRA, by path."""
    return {path: layer for path, layer in model.named_modules() if "default" in getattr(layer, "lora_A", {})}


@torch.no_grad()
def main_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], count: int
) -> dict[str, Tensor]:
    """The main directions of the inputs of each layer: path -> `(d, count)`. Adapters must not act yet."""
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
    return {path: torch.svd_lowrank(sums[path], q=2 * count, niter=6)[0][:, :count] for path in sums}


def inputs_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows that the weight of a layer is multiplied with; the patches of a convolution."""
    base: Any = getattr(layer, "base_layer", layer)
    if not isinstance(base, nn.Conv2d):
        return x.flatten(0, -2)
    size = base.kernel_size, base.dilation, base.padding, base.stride
    return nn.functional.unfold(x, *size).mT.flatten(0, 1)


def protect_lora(optimizer: torch.optim.Optimizer, model: nn.Module, bases: Mapping[str, Tensor]) -> None:
    """Keep the rows of `A` orthogonal to directions of the inputs, so that `B A x = 0` for them."""
    held = [(layer.lora_A["default"].weight, bases[path]) for path, layer in lora_layers(model).items()]

    @torch.no_grad()
    def project(*_: Any) -> None:
        for down, basis in held:
            rows = down.flatten(1)
            down.copy_((rows - (rows @ basis) @ basis.T).view_as(down))

    project()
    optimizer.register_step_post_hook(project)
