"""Whether the gradients of an exported training step are those of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError, VerificationError
from hra_fx.export.step_module import StepModule
from hra_fx.model.example_inputs import preserve_rng_state

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: The largest relative difference between two computations of one gradient. Rounding in float32 reaches 1e-2, for batch
#: norm over few values; wrong gradients were off by a third and more.
_TOLERANCE = 3e-2
#: The share of the norm of all gradients below which the gradient of one parameter is rounding error.
_NOISE = 1e-4


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A block after which the buffers of a model and the random number generators are as before."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with preserve_rng_state():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)


def gradients_of(step: StepModule) -> dict[str, Tensor]:
    """The loss, under the name "", and the gradients of all parameters that require them.

    Raises:
        AdapterError: they are random, or none of the parameters has an effect.
    """
    first, second = _computed(step), _computed(step)
    if _different(first, second) is not None:
        raise AdapterError(
            "export_training_step: the gradients are random, so those of the program cannot be checked. Call "
            "model.eval() first: dropout is off then, and the adapters are trained as before."
        )
    return first


def check_gradients(program: ExportedProgram, step: StepModule, wanted: Mapping[str, Tensor]) -> None:
    """Compare the program with the model on the example.

    Raises:
        VerificationError: the loss or a gradient is different.
    """
    with torch.no_grad():
        loss, gradients = program.module()(*step.example())
    if (found := _different({"": loss, **gradients}, wanted)) is not None:
        name, error = found
        what = f"the gradient of {name}" if name else "the loss"
        raise VerificationError(
            f"export_training_step: {what} in the program differs from PyTorch's by {error:.1e} of its norm. The "
            f"backward pass of exported programs is experimental: torch {torch.__version__} computes it wrong for an "
            "operator of this model. Try another release, or write the operator in basic ones."
        )


def _computed(step: StepModule) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in step.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        loss = step(*step.example())
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}
    return {"": loss.detach(), **found}


def _different(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """The first value that differs from the one that is wanted, and by what share of its norm."""
    norms = {name: float(value.double().norm()) for name, value in wanted.items()}
    noise = _NOISE * max(norm for name, norm in norms.items() if name) if len(norms) > 1 else 0.0
    for name, value in wanted.items():
        difference = float((found[name].double() - value.double()).norm()) if name in found else norms[name]
        if not difference <= _TOLERANCE * (norms[name] + noise):
            return name, difference / (norms[name] or 1.0)
    return None
