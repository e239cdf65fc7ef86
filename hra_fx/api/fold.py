"""`fold`: merge adapters into the weights, so that the model becomes a plain base model."""

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
    """Fold adapters into the weights in place, `W <- W Q`. When all adapters are folded, the model is a plain model.

    It then has the classes, graph, `state_dict` keys and `requires_grad` flags from before `transform`. Only the values
    of the folded weights, and of tensors trained through `bias` and `modules_to_save`, differ.

    All vectors and weights are checked first. Then the new weights are computed and written one layer at a time, in
    float64 if the device supports it. So folding needs extra memory for only a few copies of one layer. If it is
    interrupted, the model still computes the same outputs, and another call of `fold` finishes the work. To see the
    rounding error of each layer before folding, use `plan_fold`.

    A weight that shares memory with other tensors (an output layer tied to the embeddings) is untied: the layer gets
    its own parameter, and the others are not changed. If transformers ties them by `config.tie_word_embeddings`, that
    is set to False, and all other tensors that it tied get their own memory too.

    A quantized weight (bitsandbytes, torchao) is folded only with `requantize=True`: it is dequantized, rotated, and
    quantized again in the same scheme. The quantization error is often larger than the effect of the adapter.

    Args:
        model: a transformed model, or an `ExportedProgram` from `transform`, for which a new program is returned.
        adapter_names: one or more adapters to fold, in this order; the others are kept and act on the new weights.
            `None` folds the active adapters and removes the others.
        requantize: whether quantized weights may be folded.

    Returns:
        `model`, or the new program.

    Raises:
        AdapterError: the model has no adapters or no adapter with one of these names, or other active adapters come
            before them in the product.
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
                "`adapter_names` and `requantize` are not supported for a captured program: it has one adapter, and "
                "its weights are not quantized. Leave them out."
            )
        captured: Any = model
        return fold_captured(captured)  # type: ignore[return-value]
    module: Any = model
    prepare_fold(module, adapter_names, requantize=requantize).run()
    return model
