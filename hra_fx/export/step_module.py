"""The module that `export_training_step` exports: the loss of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hra_fx.compat import NON_PERSISTENT
from hra_fx.errors import AdapterError
from hra_fx.layers.batching import factors_in_exported_batches
from hra_fx.model.example_inputs import clone_inputs, normalize_inputs

_TENSORS = ("_parameters", "_buffers", "_modules", NON_PERSISTENT)


class StepModule(nn.Module):
    """The loss of a model. Its parameters and buffers are those of the model, under the same names.

    Args:
        model: the model.
        example_inputs: as in `transform`.
        loss: computes the loss; `None` if the model does.
        labels: the second argument of `loss`, if it has one.

    Raises:
        AdapterError: `example_inputs` are no arguments of the model.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, loss: Callable[..., Tensor] | None, labels: Any) -> None:
        """Share the tensors of `model`."""
        super().__init__()
        vars(self).update({name: value for name, value in vars(model).items() if name in _TENSORS})
        self.training = model.training
        args, kwargs = normalize_inputs(example_inputs)
        names = _names(model, args, kwargs)
        if labels is not None:
            if "labels" in names:
                raise AdapterError("export_training_step: labels are in `example_inputs`, and given as `labels` too.")
            names.append("labels")
        self._values = (*args, *kwargs.values(), *(() if labels is None else (labels,)))

        def forward(*values: Any) -> Tensor:
            inputs, rest = values[: len(args)], dict(zip(names[len(args) :], values[len(args) :], strict=True))
            targets = () if labels is None else (rest.pop("labels"),)
            with factors_in_exported_batches(model.modules()):
                outputs = model(*inputs, **rest)
            return _loss_of(outputs) if loss is None else _scalar(loss(outputs, *targets))

        # torch.export reads the names of inputs there.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        vars(forward)["__signature__"] = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        vars(self)["forward"] = forward

    def example(self) -> tuple[Any, ...]:
        """A copy of the example: the arguments of the model in their order, then the labels."""
        return clone_inputs((self._values, {}))[0]


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The names of the arguments of a call."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise AdapterError(f"export_training_step: example_inputs do not fit {type(model).__name__}: {error}") from None
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, parameter in signature.parameters.items() if parameter.kind not in several]
    return [known[place] if place < len(known) else f"input_{place}" for place in range(len(args))] + list(kwargs)


def _loss_of(outputs: Any) -> Tensor:
    """The loss that a model returns."""
    found = getattr(outputs, "loss", None)
    if isinstance(outputs, (dict, tuple)):
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
