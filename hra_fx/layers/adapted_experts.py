"""Adapted experts: a module with adapted 3-D parameters, which other code reads as rotated experts.

`weight[i]` is the rotated weight of one expert. A product with it reflects the input instead: no rotated weight is
computed or kept for the backward pass. The same applies to products with all experts, by `torch.bmm` and by the grouped
products of transformers. All other operations compute `W_e Q_e` of the experts that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.errors import AdapterError
from hra_fx.functional.rotate import rotate_weight
from hra_fx.kernels.dispatch import is_plain, is_plain_eager, products_dtype
from hra_fx.kernels.factors import Factors
from hra_fx.kernels.linear import reflect_each
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.class_swap import SwapMixin, swap, unswap
from hra_fx.layers.experts_weight import CHILD, ExpertsWeight
from hra_fx.layers.target import REFLECTION, weight_place
from hra_fx.layers.weight import read_weight, running

_TRANSPOSING = (Tensor.transpose, torch.transpose, Tensor.mT.__get__)  # type: ignore[attr-defined]
_INTEGERS = (torch.int32, torch.int64)
#: Kernels for grouped products need rows with a multiple of 16 bytes.
_ALIGNMENT = 16


class AdaptedExperts(SwapMixin):
    """A module with adapted 3-D parameters. While the model runs, attribute access gives `W_e Q_e`."""

    def __getattr__(self, name: str) -> Any:
        """Return the rotated experts for the name of an adapted parameter, and the module's attribute otherwise."""
        layer = vars(self).get("_modules", {}).get(CHILD + name)
        if not isinstance(layer, AdaptedLayer) or REFLECTION not in layer._modules or name not in self._parameters:
            return super().__getattr__(name)
        try:
            return read_weight(layer, _linked)
        except AttributeError as error:  # Python would treat it as a missing attribute
            raise RuntimeError(f"{type(self).__name__}.{name}: it cannot be rotated ({error})") from error

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Run the forward of `base`, which reads the experts, also if it is called alone."""
        return {"forward": running(base.forward)}


def adapted_parameters(owner: nn.Module) -> list[Any]:
    """The layers that represent the adapted parameters of a module."""
    return [child for child in owner._modules.values() if isinstance(child, ExpertsWeight)]


def attach(layer: ExpertsWeight) -> None:
    """Make a layer a child of its owner. The owner then reads its parameter through this layer."""
    swap(layer.owner, AdaptedExperts)
    layer.owner._modules[CHILD + layer.parameter] = layer


def detach(layer: ExpertsWeight) -> None:
    """Undo `attach`."""
    layer.owner._modules.pop(CHILD + layer.parameter, None)
    if not adapted_parameters(layer.owner):
        unswap(layer.owner, AdaptedExperts)


class RotatedExperts(Tensor):
    """The rotated weights of all or some experts: `(experts, out, d)` or `(experts, d, out)`.

    It has the metadata of the base weights, and computes values when they are used. A write raises an error, because
    the result would be lost.

    Attributes:
        layer: the layer that represents the parameter.
        index: the index that selected experts; `None` for all.
        flipped: whether the last two dimensions are swapped.
    """

    layer: Any
    index: Any
    flipped: bool
    _selected: Tensor | None

    @staticmethod
    def __new__(
        cls, layer: nn.Module, index: Any = None, selected: Tensor | None = None, *, flipped: bool = False
    ) -> RotatedExperts:
        """Represent the weight of a layer, or `selected`: the experts that `index` selects from it."""
        whole: Any = layer.hra_base if selected is None else selected
        made: RotatedExperts = compat.wrapper_tensor(cls, whole.mT if flipped else whole)
        made.layer, made.index, made._selected, made.flipped = layer, index, selected, flipped
        return made

    def base(self) -> Tensor:
        """The base weights of the experts."""
        weight: Tensor = self.layer.hra_base if self._selected is None else self._selected
        return weight.mT if self.flipped else weight

    def value(self) -> Tensor:
        """The rotated weights of the experts, as a plain tensor."""
        adapters = self.layer.hra_u
        vectors = adapters.vectors_at(self.index)
        if vectors is None:
            return self.base()
        return rotate_weight(self.base(), vectors, transposed=adapters.fan_in_fan_out is not self.flipped)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return metadata, select experts, or reflect the input of a product. Otherwise compute the values."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func in _METADATA:
            return compat.disabled_torch_function(func, types, args, kwargs)
        if is_plain_eager():
            if (part := _part(func, args, kwargs)) is not None:
                return part
            product = _PRODUCTS.get(name) if len(args) > 1 else None  # operands by position
            if product is not None and (output := product(func, args, kwargs)) is not None:
                return output
        if args and isinstance(args[0], cls) and (name == "__setitem__" or (name[-1:] == "_" and name[:1] != "_")):
            raise _lost_write(args[0], name)
        return func(*compat.pytree.tree_map(_value, args), **compat.pytree.tree_map(_value, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Handle the forward of a custom autograd function, which runs below autograd (`_Link`)."""
        schema = compat.schema_of(func)
        if schema is not None and schema.is_mutable and args and isinstance(args[0], cls):
            raise _lost_write(args[0], str(func))
        with torch.no_grad():
            return func(*compat.pytree.tree_map(_value, args), **compat.pytree.tree_map(_value, kwargs or {}))


#: Functions whose result does not depend on values.
_METADATA = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_cpu", "is_cuda", "is_meta", "is_leaf", "grad", "grad_fn")),
        *(Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.__len__, Tensor.is_contiguous),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device),
    ]
)


def _value(part: Any) -> Any:
    return part.value() if isinstance(part, RotatedExperts) else part


def _lost_write(weight: RotatedExperts, name: str) -> AdapterError:
    owner, parameter = weight_place(weight.layer)
    return AdapterError(
        f"{type(owner).__name__}.{parameter}: {name} writes into the weight of adapted experts while the model "
        "runs. It is W Q then, so the change would be lost. Write outside of the forward, or call hra_fx.fold(model)."
    )


def _linked(layer: Any) -> RotatedExperts:
    """The rotated experts of a layer, with gradients for code that computes its own.

    Torch functions compute with `W Q`, which autograd records. But the forward of a custom `torch.autograd.Function`
    runs without gradients. The gradient that its backward returns for the weight is passed on here.
    """
    trained = [tensor for tensor in (*layer.hra_u.parameters(), layer.hra_base) if tensor.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return RotatedExperts(layer)
    return _Link.apply(layer, *trained)  # type: ignore[no-untyped-call, no-any-return]


class _Link(torch.autograd.Function):
    """`(layer, trained parameters) -> W Q`, with the backward of `W Q`."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, *trained: nn.Parameter) -> RotatedExperts:
        ctx.layer, ctx.trained = layer, trained
        return RotatedExperts(layer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # create_graph=True
        with torch.enable_grad():
            rotated = RotatedExperts(ctx.layer).value()
        return None, *torch.autograd.grad(rotated, ctx.trained, grad, create_graph=again, allow_unused=True)


def _part(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> RotatedExperts | None:
    """Handle functions that select experts or swap the last two dimensions; `None` for any other function."""
    weight = args[0] if args else None
    if kwargs or type(weight) is not RotatedExperts:
        return None
    if func is Tensor.__getitem__ and weight.index is None and not weight.flipped and _selects(args[1]):
        return RotatedExperts(weight.layer, args[1], weight.base()[args[1]])
    if func in _TRANSPOSING and {dim % weight.dim() for dim in args[1:]} in (
        set(),
        {weight.dim() - 2, weight.dim() - 1},
    ):
        return RotatedExperts(weight.layer, weight.index, weight._selected, flipped=not weight.flipped)
    return None


def _selects(index: Any) -> bool:
    """Whether an index selects experts: an integer, or a tensor of integers with at most one dimension."""
    if isinstance(index, Tensor):
        return type(index) is Tensor and index.dim() < 2 and index.dtype in _INTEGERS
    return isinstance(index, int) and not isinstance(index, bool)


def _factors(weight: Any, x: Any, *, last: bool, dtype: torch.dtype | None = None) -> Any:
    """The factors of the experts of a weight for an input `x`; `None` if the product needs the rotated values.

    `last` is whether the product sums over the last dimension of the weight.
    """
    if type(weight) is not RotatedExperts or not isinstance(x, Tensor) or not is_plain(x):
        return None
    adapters: Any = weight.layer.hra_u
    if (adapters.fan_in_fan_out is weight.flipped) is not last:
        return None
    return adapters.factors_at(weight.index, dtype or products_dtype(x.device, x.dtype))


def _linear(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`F.linear(x, weight of one expert, bias)`."""
    x, weight = args[:2]
    if (factors := _factors(weight, x, last=True)) is None or weight.dim() != 2:
        return None
    return func(reflect_each(x, factors), weight.base(), *args[2:], **kwargs)


def _matmul(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`x @ weight`, for one expert, or for a batch of them."""
    x, weight = args
    if (factors := _factors(weight, x, last=False)) is None or (weight.dim() == 3 and x.shape[:-2] != weight.shape[:1]):
        return None
    return func(reflect_each(x, factors), weight.base(), **kwargs)


def _bmm(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`torch.bmm(x, weight)` or `torch.bmm(weight, x)`, with one expert for each matrix."""
    first, second = args
    if (factors := _factors(second, first, last=False)) is not None:
        x = reflect_each(first, factors)
        if _gathers_again(second, first):
            return _gathered_product(x, second, second.flipped)
        return func(x, second.base(), **kwargs)
    if (factors := _factors(first, second, last=True)) is not None:
        x = reflect_each(second.mT, factors)
        if _gathers_again(first, second):
            return _gathered_product(x, first, not first.flipped).mT
        return func(first.base(), x.mT, **kwargs)
    return None


def _gathers_again(weight: RotatedExperts, x: Tensor) -> bool:
    """Whether the backward pass should gather the weights of some experts again instead of keeping them.

    This takes time, so it is only done if the base model does not keep them either: if the input does not need a
    gradient, as in the first layers.
    """
    whole: Any = weight.layer.hra_base
    frozen = not x.requires_grad and not whole.requires_grad and x.dtype is whole.dtype
    return frozen and isinstance(weight.index, Tensor) and not torch.is_autocast_enabled(x.device.type)


def _gathered_product(x: Tensor, weight: RotatedExperts, transposed: bool) -> Tensor:
    """`X_i W_i` or `X_i W_i^T` with the selected base weights."""
    whole, chosen = weight.layer.hra_base, weight._selected
    product: Tensor = _GatheredProduct.apply(x, chosen, whole, weight.index, transposed)  # type: ignore[no-untyped-call]
    return product


class _GatheredProduct(torch.autograd.Function):
    """`X_i W_i`, or `X_i W_i^T` if transposed, with frozen weights `W = weight[index]`, one for each `X_i`.

    The backward pass gathers the weights again. A plain product would keep a copy of a weight for each token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathered: Tensor, weight: Tensor, index: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(weight, index)
        ctx.transposed = transposed
        return torch.bmm(x, gathered.mT if transposed else gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, index = ctx.saved_tensors
        gathered = weight[index]
        return torch.bmm(gradients[0], gathered if ctx.transposed else gathered.mT), None, None, None, None


def _grouped_mm(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The product of the weights of all experts with rows that are sorted by expert."""
    x, weight, *rest = args
    if not isinstance(x, Tensor) or x.dim() != 2:
        return None
    if (factors := _factors(weight, x, last=False, dtype=x.dtype)) is None or weight.index is not None:
        return None
    reflected = _reflect_groups(x, factors, lambda rows, matrices: func(rows, matrices, *rest, **kwargs))
    return func(reflected, weight.base(), *rest, **kwargs)


def _reflect_groups(x: Tensor, factors: Factors, multiply: Callable[[Tensor, Tensor], Any]) -> Tensor:
    """Reflect rows `x: (n, d)` that are sorted by expert, each by the chain of its expert.

    The factors `(experts, k, d)` have the dtype of `x`. `multiply` is the grouped product of rows `(n, a)` with
    matrices `(experts, a, b)`.
    """
    step = _ALIGNMENT // x.element_size()
    missing = -factors.rows.shape[1] % step
    rows, down = (F.pad(factor, (0, 0, 0, missing)) for factor in factors)
    reflected: Tensor = x + multiply(multiply(x, down.mT), rows)
    return reflected


_PRODUCTS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__"), _matmul),
    "bmm": _bmm,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped_mm),
}
