"""`fold`: adapters are multiplied into the weights, and the model becomes a plain base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from hra_fx.errors import AdapterError
from hra_fx.export.captured import fold_captured, is_captured
from hra_fx.model.fold import prepare_fold

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

M = TypeVar("M", bound="nn.Module | ExportedProgram")


def fold(model: M, adapter_names: str | Sequence[str] | None = None, *, requantize: bool = False) -> M:
    """Fold adapters into the weights, `W <- W Q`, in place; without adapters left the model is a plain base model.

    Then classes, graph, `state_dict` keys and `requires_grad` are those from before `transform`. Only weights differ,
    and the tensors that `bias` and `modules_to_save` trained.

    All vectors and weights are checked first. Then the layers are computed, in float64 where the device has it, and
    written one after another, so that the fold needs memory for a few copies of one layer. If it is interrupted in
    between, the model computes the same as before, and another `fold` finishes the work. `plan_fold` shows the rounding
    error of each layer first.

    A weight that shares memory with other tensors (an output layer tied to the embeddings) is untied: the layer gets a
    parameter of its own, and the others are not changed. If transformers ties them by `config.tie_word_embeddings`,
    that is set to False, and everything else that it tied gets its own memory too. A part of a model does not know what
    it is
    tied to outside: fold the whole model to have its configuration updated.

    A quantized weight (bitsandbytes, torchao) is folded only with `requantize=True`: dequantized, rotated, and
    quantized again in the same scheme. The quantization error is often larger than the change by the adapter.

    Args:
        model: a transformed model, or an `ExportedProgram` of `transform`, of which a new one is made.
        adapter_names: the adapters to fold, one name or several in their order; the others stay, and act on the new
            weights. `None` folds the active ones and removes the others.
        requantize: whether quantized weights may be folded.

    Returns:
        `model`.

    Raises:
        AdapterError: the model has no adapters, or not these; or other active ones come before them.
        FoldError: a weight cannot be folded: it has no data, is quantized or not finite, has linearly dependent
            Gram-Schmidt vectors, or is tied in a model whose forward depends on that. No weight was changed.

    Warns:
        HRAWarning: adapters that are not active are removed, weights are untied, or weights were quantized again.

    Example:
        >>> from torch import nn
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8)), HRAConfig(r=2, target_modules=["0"]))
        >>> list(fold(model).state_dict())
        ['0.weight', '0.bias']
    """
    if is_captured(model):
        if adapter_names is not None or requantize:
            raise AdapterError(
                "fold of a captured program takes no adapter_names and no requantize: it has one adapter, and its "
                "weights are not quantized. Leave them out."
            )
        captured: Any = model
        return fold_captured(captured)  # type: ignore[no-any-return]
    module: Any = model
    prepare_fold(module, adapter_names, requantize=requantize).run()
    return model
