"""Whether the gradients of an exported training step are those of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError, VerificationError
from hra_fx.export.step_module import StepModule
from hra_fx.model.example_inputs import preserve_rng_state, seed_everything

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: The largest relative difference between two computations of one gradient. Rounding in float32 reaches 1e-2, for batch
#: norm over few values; wrong gradients were off by a third and more.
_TOLERANCE = 3e-2
#: What rounding leaves of a gradient that is zero, in units of the rounding of the largest gradient.
_ROUNDING = 30


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A block after which the buffers of a model and the random number generators are as before."""
    before = [
        (part, name, buffer, buffer.clone())
        for part in model.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    with preserve_rng_state():
        try:
            yield
        finally:
            with torch.no_grad():
                for part, name, buffer, value in before:
                    part._buffers[name] = buffer.copy_(value)


def gradients_of(step: StepModule) -> dict[str, Tensor]:
    """The loss, under the name "", and the gradients of all parameters that require them and have an effect.

    Raises:
        AdapterError: the loss is not finite, nothing that is trained has an effect on it, or the gradients are random.
    """
    with unchanged(step):
        first = _computed(step)
        seed = int(torch.randint(2**31, ()))
    with unchanged(step):
        seed_everything(seed)  # a run that draws numbers draws others
        second = _computed(step)
    if not bool(first[""].isfinite()):
        raise AdapterError(
            f"export_training_step: the loss of the example is {float(first[''])}. Pass an example with a finite loss, "
            "with labels of which some count, for example."
        )
    if _different(first, second) is not None:
        advice = "Call model.eval() first: dropout is off then, and the adapters are trained as before."
        training = any(part.training for part in step.modules())
        raise AdapterError(
            "export_training_step: the gradients are random, so those of the program cannot be checked. "
            + (advice if training else "The forward draws random numbers in eval mode; pass them as an input.")
        )
    return first


def check_gradients(program: ExportedProgram, step: StepModule, wanted: Mapping[str, Tensor]) -> None:
    """Compare the program with the model on the example.

    Raises:
        VerificationError: the loss or a gradient is different.
    """
    with unchanged(step), torch.no_grad():
        loss, gradients = program.module()(*step.example())
    if (found := _different({"": loss, **gradients}, wanted)) is not None:
        name, error = found
        what = f"the gradient of {name}" if name else "the loss"
        raise VerificationError(
            f"export_training_step: {what} in the program differs from PyTorch's by {error:.1e} of its norm. The "
            f"backward pass of exported programs is experimental: torch {torch.__version__} may compute it wrong for "
            "an operator of this model, and drops autograd functions of your own and hooks on parameters. Use basic "
            "operators in their place. Weights in 16 bits round much; try float32."
        )


def _computed(step: StepModule) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in step.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        loss = step(*step.example())
        if not loss.requires_grad:
            raise AdapterError(
                "export_training_step: the loss does not depend on anything that is trained. The adapters are merged "
                "(hra_fx.unmerge_adapter), disabled, or on layers that the call does not use; or the loss is detached."
            )
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}
    return {"": loss.detach(), **found}


def _different(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """The first value that differs from the one that is wanted, and by what share of its norm."""
    norms = {name: float(value.double().norm()) for name, value in wanted.items()}
    largest = max(norms.values())
    for name, value in wanted.items():
        eps = torch.finfo(torch.float64 if value.dtype == torch.float64 else torch.float32).eps
        difference = float((found[name].double() - value.double()).norm()) if name in found else norms[name]
        if not difference <= _TOLERANCE * norms[name] + _ROUNDING * eps * largest:
            return name, difference / (norms[name] or 1.0)
    return None
