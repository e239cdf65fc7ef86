"""The module that `export_training_step` exports: the loss of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from hra_fx.compat import NON_PERSISTENT, is_exporting, pytree
from hra_fx.errors import AdapterError
from hra_fx.layers.batching import factors_in_exported_batches
from hra_fx.model.example_inputs import clone_inputs, normalize_inputs

_TENSORS = ("_parameters", "_buffers", "_modules", NON_PERSISTENT)


class StepModule(nn.Module):
    """The loss of a model. Its parameters and buffers are those of the model, under the same names.

    Args:
        model: the model.
        example_inputs: as in `transform`. Arguments without a tensor are constants.
        loss: computes the loss; `None` if the model does.
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
                raise AdapterError("export_training_step: labels are in `example_inputs`, and given as `labels` too.")
            given["labels"] = labels
        self.inputs = {name: value for name, value in given.items() if _has_tensor(value)}

        def forward(*values: Any) -> Tensor:
            now = given | dict(zip(self.inputs, values, strict=True))
            # The run that the program is compared with computes as the model always does.
            with factors_in_exported_batches(model.modules()) if is_exporting() else nullcontext():
                positional, keywords = names[: len(args)], names[len(args) :]
                outputs = model(*(now[name] for name in positional), **{name: now[name] for name in keywords})
            if loss is None:
                return _loss_of(outputs)
            return _scalar(loss(outputs) if labels is None else loss(outputs, now["labels"]))

        # torch.export reads the names of inputs there.
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
