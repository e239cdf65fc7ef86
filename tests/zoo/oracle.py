"""The oracle of the zoo: a plain copy of the base model, over weights `W Q` that are written into it.

It knows nothing of the library but the names of its parameters. `Q` is multiplied out in float64, dense where that is
small (`tests/support/oracles.py`), and else applied to `W` one reflection after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from layers.checking import vectors_of
from oracles import dense_product
from torch import Tensor, nn

_MARK = ".hra_u."
_DENSE = 64


def weight_name(layer: nn.Module) -> str:
    """The parameter that is rotated."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def place_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the parameter that the vectors at this path rotate."""
    owner, _, last = path.rpartition(".")
    if last.startswith("hra_"):
        return model.get_submodule(owner), last.removeprefix("hra_")
    layer = model.get_submodule(path)
    return layer, weight_name(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight of a layer is `(in, out)`: transformers' Conv1D, and experts of two models."""
    if type(layer).__name__ in ("GptOssExperts", "Llama4TextExperts"):
        return True
    return any(
        kind.__module__ == "transformers.pytorch_utils" and kind.__name__ == "Conv1D" for kind in type(layer).mro()
    )


def rotated(layer: nn.Module, weight: Tensor, chain: Tensor) -> Tensor:
    """`W Q` in float64 and the shape of `weight`; differentiable in both.

    Args:
        layer: the plain layer.
        weight: its weight.
        chain: `(d, k)`, the reflections in order; of experts, `(experts, d, k)`.
    """
    if chain.dim() == 3:
        return torch.stack([rotated(layer, one, own) for one, own in zip(weight, chain, strict=True)])
    turned = weight.double().mT if is_transposed(layer) else weight.double()
    rows = turned.flatten(1)
    if len(chain) <= _DENSE:
        rows = rows @ dense_product(chain)
    else:
        for u in chain.double().unbind(1):
            rows = rows - torch.outer(rows @ u, 2 * u / u.dot(u))
    turned = rows.view(turned.shape)
    return turned.mT if is_transposed(layer) else turned


class Oracle:
    """The base model over the rotated weights.

    Attributes:
        plain: the copy that is run.
    """

    def __init__(self, base: nn.Module, model: nn.Module, noise: float = 0.0) -> None:
        """Weights of `base` turned by the vectors of `model`.

        Args:
            base: the plain model.
            model: the adapted one.
            noise: relative size of a random change of every turned weight, to learn what rounding does to the model.
        """
        self.plain = copy.deepcopy(base).requires_grad_(False)
        self.vectors = vectors_of(model)
        self._anchors = dict(model.named_buffers())
        self._weights: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(5)
        for path in self.vectors:
            layer, name = place_of(self.plain, path)
            weight = layer._parameters[name]
            assert weight is not None
            self._weights[path] = weight
            with torch.no_grad():
                turned = rotated(layer, weight, self._chain(path, self.vectors[path]))
                if noise:
                    turned = turned * (1 + noise * torch.randn(turned.shape, generator=generator, dtype=turned.dtype))
            # Written into this layer only: what is tied to its weight stays what it was.
            layer._parameters[name] = nn.Parameter(turned.to(weight.dtype))

    def gradients(self) -> dict[str, Tensor]:
        """Layer path -> `d loss / d U`, after a backward pass through `plain`, and clears what that left."""
        found = {}
        for path, vectors in self.vectors.items():
            layer, name = place_of(self.plain, path)
            turned = layer._parameters[name]
            assert turned is not None
            leaf = vectors.detach().double().requires_grad_()
            if turned.grad is not None:
                image = rotated(layer, self._weights[path], self._chain(path, leaf))
                found[path] = torch.autograd.grad(image, leaf, turned.grad.double())[0]
                turned.grad = None
            else:
                found[path] = torch.zeros_like(leaf)
        return found

    def _chain(self, path: str, vectors: Tensor) -> Tensor:
        anchor = self._anchors.get(f"{path}{_MARK}default_anchor")
        return vectors.double() if anchor is None else torch.cat([anchor.double(), vectors.double()], dim=-1)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put the buffers back afterwards."""
    kept = [
        (module, name, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    yield
    for module, name, buffer in kept:
        module._buffers[name] = buffer


def buffers_of(model: nn.Module) -> Mapping[str, Tensor]:
    """The model's own buffers that are saved, copied; the others are caches."""
    saved = model.state_dict().keys()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name in saved and _MARK not in name}


def stir(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Give a fresh model the values of a trained one: nothing that is zero, one, or too small to be seen.

    A layer whose weight starts at zero (ControlNet, adaLN-zero, the last norm of a block) hides all before it, and its
    own reflections: against such a model a wrong adapter is right.
    """
    generator = torch.Generator().manual_seed(2)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)

    turned = {id(layer._parameters.get(weight_name(layer))): layer for layer in layers.values()}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            layer = turned.get(id(parameter))
            if layer is not None:
                fan_in = parameter.shape[0] if is_transposed(layer) else parameter[0].numel()
                size = float(parameter.double().pow(2).mean().sqrt()) * fan_in**0.5
                if size < 1e-3:
                    parameter.copy_(draw(parameter) / fan_in**0.5)
                elif size < 0.5:
                    parameter.mul_(1 / size)
            elif float((parameter - parameter.flatten()[0]).abs().max()) < 1e-6:
                parameter.add_(0.1 * draw(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * draw(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
