"""Linear layers of any library, such as GPTQ, AWQ, AQLM or EETQ. Only what they compute is known.

The values of the weight are the outputs for the unit vectors, so hra_fx does not need to know how they are stored.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.class_swap import original_class
from hra_fx.layers.quantized.scheme import QuantScheme

#: Layers that round their inputs to 8 bits deviate by 3 %; layers that are not linear by much more.
_LINEAR = 0.1
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Other(QuantScheme):
    """A module with `in_features` and `out_features` that is not an `nn.Linear`. Its own forward is called."""

    def description(self, layer: Any) -> str:
        """The package and the class."""
        cls = original_class(layer)
        return f"{cls.__module__.partition('.')[0]}, {cls.__name__}"

    def why_not_adapted(self, layer: Any) -> str | None:
        """Call the layer to find out whether it is linear: only then is reflecting its input the same as `W Q`."""
        if any(tensor.is_meta for tensor in tensors_of(layer).values()):
            return "its tensors have no data, so nothing says whether it is linear. Load the weights first"
        if len(inspect.signature(original_class(layer).forward).parameters) != 2:
            return "its forward takes more than one input. Leave it out with exclude_modules"
        rows = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
        rows[0], rows[3] = 0, rows[1] + rows[2]
        training = layer.training
        try:
            layer.train()  # with dropout, it would not be linear
            zero, one, two, both = outputs(layer, rows).double()
            error = (both - one - two + zero).norm() / (both - zero).norm()
        except Exception as problem:  # the code of another library may raise anything
            return f"calling it with {tuple(rows.shape)} failed ({problem}). Leave it out with exclude_modules"
        finally:
            layer.train(training)
        if one.shape == (layer.out_features,) and error < _LINEAR:
            return None
        return "its output is not linear in its input, so it has no weight to rotate. Leave it out with exclude_modules"

    def values(self, layer: Any) -> Tensor:
        """The outputs for the unit vectors, without the bias, in the dtype of the outputs."""
        unit = torch.eye(layer.in_features + 1, layer.in_features)  # the last row is zero
        found = outputs(layer, unit)
        return (found[:-1] - found[-1]).mT


class GPTQModel(Other):
    """Layers of GPTQModel: GPTQ, AWQ and others, with one class for each kernel."""

    def why_not_adapted(self, layer: Any) -> str | None:
        """All its classes are linear, and some compile a kernel when they are first called."""
        return None


def outputs(layer: nn.Module, rows: Tensor) -> Tensor:
    """What a layer without its adapters computes for rows, in the first dtype that it accepts."""
    tensors = tensors_of(layer)
    device = next(iter(tensors.values())).device
    own = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    forward: Any = original_class(layer).forward
    dtypes = dict.fromkeys((torch.float64,) if own == torch.float64 else (torch.float32, own, *_DTYPES))
    problems = []
    for dtype in dtypes:
        try:
            with torch.no_grad():
                found: Tensor = forward(layer, rows.to(device, dtype))
            return found
        except RuntimeError as problem:
            problems.append(problem)
    raise problems[0]


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's own parameters and buffers, the largest first."""
    found = {name: t for held in (layer._parameters, layer._buffers) for name, t in held.items() if t is not None}
    return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))
