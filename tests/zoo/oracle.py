"""The oracle of the zoo: a plain copy of the base model, over weights `W Q` that are written into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from layers.checking import dense_weights, vectors_of
from torch import Tensor, nn


class Oracle:
    """The base model over the rotated weights.

    Attributes:
        plain: the copy that is run.
    """

    def __init__(self, base: nn.Module, model: nn.Module) -> None:
        """Weights of `base` turned by the vectors of `model`."""
        self.plain = copy.deepcopy(base).requires_grad_(False)
        self._base, self._model = base, model
        with torch.no_grad():
            turned = dense_weights(base, model)
        for name, weight in turned.items():
            owner, _, last = name.rpartition(".")
            # Written into this layer only: what is tied to its weight stays what it was.
            parameter = nn.Parameter(weight.to(base.get_parameter(name).dtype))
            self.plain.get_submodule(owner)._parameters[last] = parameter
        self._names = list(turned)

    def noisy(self, noise: float) -> nn.Module:
        """A copy of `plain` with a random change of every turned weight, of this relative size, as rounding has."""
        plain = copy.deepcopy(self.plain)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in map(plain.get_parameter, self._names):
                weight *= 1 + noise * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
        return plain

    def gradients(self, plain: nn.Module) -> dict[str, Tensor]:
        """Layer path -> `d loss / d U`, after a backward pass through `plain`, or a noisy copy of it."""
        vectors = vectors_of(self._model)
        turned = dense_weights(self._base, self._model)
        weights = [plain.get_parameter(name) for name in self._names]
        given = [torch.zeros_like(w).double() if w.grad is None else w.grad.double() for w in weights]
        plain.zero_grad()
        found = torch.autograd.grad(list(turned.values()), list(vectors.values()), given)
        return {path: gradient.double() for path, gradient in zip(vectors, found, strict=True)}


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
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name in saved and ".hra_u." not in name}


def stir(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Give a fresh model the values of a trained one: nothing that is zero, one, or too small to be seen.

    A layer whose weight starts at zero (ControlNet, adaLN-zero, the last norm of a block) hides all before it, and its
    own reflections: against such a model a wrong adapter is right.
    """
    generator = torch.Generator().manual_seed(2)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)

    turned = {id(layer._parameters.get(name)) for layer in layers.values() for name in ("weight", "in_proj_weight")}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if id(parameter) in turned and parameter.dim() > 1:
                fan_in = parameter[0].numel()
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
