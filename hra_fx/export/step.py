"""The module that `export_training_step` exports, the loss of a model, and the comparison of its gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hra_fx.compat import NON_PERSISTENT, is_exporting, pytree
from hra_fx.errors import AdapterError, VerificationError
from hra_fx.layers.batching import factors_in_exported_batches
from hra_fx.model.example_inputs import clone_inputs, normalize_inputs, preserve_rng_state, seed_everything
from hra_fx.tracing.inputs import argument_names

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_TENSORS = ("_parameters", "_buffers", "_modules", NON_PERSISTENT)


class StepModule(nn.Module):
    """Computes the loss of a model. It has the parameters and buffers of the model, with the same names.

    Args:
        model: the model.
        example_inputs: as in `transform`. Arguments without a tensor are constants.
        loss: computes the loss; `None` if the model computes it.
        labels: the second argument of `loss`, if it has one.

    Attributes:
        inputs: name of each input -> its example.

    Raises:
        AdapterError: `example_inputs` do not fit the model.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, loss: Callable[..., Tensor] | None, labels: Any) -> None:
        """Share the tensors of `model`."""
        super().__init__()
        vars(self).update({name: value for name, value in vars(model).items() if name in _TENSORS})
        self.training = model.training
        args, kwargs = normalize_inputs(example_inputs)
        names = _names(model, args, kwargs)
        given = dict(zip(names, (*args, *kwargs.values()), strict=True))
        if labels is not None:
            if "labels" in given:
                raise AdapterError("export_training_step: pass labels in `example_inputs` or as `labels`, not both.")
            given["labels"] = labels
        self.inputs = {name: value for name, value in given.items() if _has_tensor(value)}

        def forward(*values: Any) -> Tensor:
            now = given | dict(zip(self.inputs, values, strict=True))
            # The run for comparison computes as the model usually does.
            with factors_in_exported_batches(model.modules()) if is_exporting() else nullcontext():
                positional, keywords = names[: len(args)], names[len(args) :]
                outputs = model(*(now[name] for name in positional), **{name: now[name] for name in keywords})
            if loss is None:
                return _loss_of(outputs)
            return _scalar(loss(outputs) if labels is None else loss(outputs, now["labels"]))

        # torch.export reads the names of the inputs from the signature.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        vars(forward)["__signature__"] = inspect.Signature([inspect.Parameter(name, kind) for name in self.inputs])
        vars(self)["forward"] = forward

    def example(self) -> tuple[Any, ...]:
        """A copy of the example, in the order of the inputs."""
        return clone_inputs((tuple(self.inputs.values()), {}))[0]


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The names of the arguments of a call."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise AdapterError(f"export_training_step: example_inputs do not fit {type(model).__name__}: {error}") from None
    return argument_names(model, args, kwargs)


def _loss_of(outputs: Any) -> Tensor:
    """The loss that a model returns."""
    found = getattr(outputs, "loss", None)
    if found is None and isinstance(outputs, (dict, tuple)):
        found = outputs.get("loss") if isinstance(outputs, dict) else next(iter(outputs), None)
    return _scalar(outputs if isinstance(outputs, Tensor) else found)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise AdapterError(
            f"export_training_step: the loss must be a tensor with one value, got {got}. Pass `loss=`, a function of "
            "the outputs and `labels=`; or `labels` in `example_inputs`, if the model computes its loss from them."
        )
    return loss.reshape(())


# --- comparison -------------------------------------------------------------------------------------------------------

#: The largest relative difference between two computations of the same gradient. Rounding in float32 reaches 1e-2, for
#: batch norm over few values; wrong gradients differed by a third or more.
_TOLERANCE = 3e-2
#: The size of a gradient that is zero except for rounding, in units of the rounding of the largest gradient.
_ROUNDING = 30


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Context manager that restores the buffers of a model and the random number generators."""
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
    """The loss, with the name "", and the gradients of all parameters that require them and affect the loss.

    Raises:
        AdapterError: the loss is not finite, no trained parameter affects it, or the gradients are random.
    """
    with unchanged(step):
        first = _computed(step)
        seed = int(torch.randint(2**31, ()))
    with unchanged(step):
        seed_everything(seed)  # if a run draws random numbers, they differ
        second = _computed(step)
    if not bool(first[""].isfinite()):
        raise AdapterError(
            f"export_training_step: the loss of the example is {float(first[''])}. Pass an example with a finite loss. "
            "For example, not all labels may be ignored."
        )
    if _different(first, second) is not None:
        advice = "Call model.eval() first: this turns dropout off, and the adapters are still trained."
        training = any(part.training for part in step.modules())
        raise AdapterError(
            "export_training_step: the gradients are random, so the gradients of the program cannot be checked. "
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
            f"backward pass of exported programs is experimental: torch {torch.__version__} may compute it incorrectly "
            "for an operator of this model, and drops custom autograd functions and hooks on parameters. Use basic "
            "operators instead. 16-bit weights have large rounding errors; try float32."
        )


def _computed(step: StepModule) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in step.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        loss = step(*step.example())
        if not loss.requires_grad:
            raise AdapterError(
                "export_training_step: the loss does not depend on any trained parameter. The adapters are merged "
                "(hra_fx.unmerge_adapter), disabled, or on layers that the call does not use; or the loss is detached."
            )
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}
    return {"": loss.detach(), **found}


def _different(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """The name of the first value that differs from the expected value, and the difference relative to its norm."""
    norms = {name: float(value.double().norm()) for name, value in wanted.items()}
    largest = max(norms.values())
    for name, value in wanted.items():
        eps = torch.finfo(torch.float64 if value.dtype == torch.float64 else torch.float32).eps
        difference = float((found[name].double() - value.double()).norm()) if name in found else norms[name]
        if not difference <= _TOLERANCE * norms[name] + _ROUNDING * eps * largest:
            return name, difference / (norms[name] or 1.0)
    return None
