"""`layer.weight` of an adapted layer: reading it gives `W Q`, which is computed when it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.errors import AdapterError
from hra_fx.layers.sharding import call
from hra_fx.layers.target import REFLECTION, weight_place

#: Answered from the base weight, because they do not depend on its values.
_METADATA = frozenset(
    [
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "layout", "ndim", "is_cpu", "is_cuda")
        ),
        *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes")),
        *(Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.__len__, Tensor.nelement, Tensor.element_size),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.get_device),
    ]
)
#: Read and set on the base weight: code that freezes a weight, or clears its gradient, means the parameter.
_FLAGS = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad")),
        *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
        Tensor.requires_grad_,
    ]
)
#: Scaling `W Q` is scaling `W`. RWKV divides weights in place when it changes between train and eval mode.
_SCALING = frozenset(
    [
        *(Tensor.mul_, Tensor.div_, torch.ops.aten.mul_.Tensor, torch.ops.aten.div_.Tensor),
        *(torch.ops.aten.mul_.Scalar, torch.ops.aten.div_.Scalar),
    ]
)
_DETACHED = frozenset([Tensor.data.__get__, Tensor.detach])  # type: ignore[attr-defined]


class RotatedWeight(Tensor):
    """The weight of an adapted layer as other code sees it: a tensor whose values are `W Q`.

    Its metadata (shape, dtype, device) are those of the base weight. Any other operation first computes `W Q`, with
    gradients to the adapters that are active at that time: like a parameter, a stored weight follows its layer.
    Multiplying it by a number in place scales `W`. Other writes are refused, because the result would be lost: write to
    `layer.hra_base`, or fold first. (A write into a view of it, such as `layer.weight[0]`, is silently lost.)
    """

    _layer: nn.Module
    _is_linked: bool = False

    @staticmethod
    def __new__(cls, layer: nn.Module) -> RotatedWeight:
        """Represent the weight of `layer`, which has an active adapter."""
        made: RotatedWeight = compat.wrapper_tensor(cls, layer.hra_base)  # type: ignore[arg-type]
        made._layer = layer
        return made

    def base(self) -> Tensor:
        """The base weight `W`; once the adapters are folded or deleted, the weight of the plain layer."""
        if self._adapters() is not None:
            return self._layer.hra_base  # type: ignore[return-value]
        owner, name = weight_place(self._layer)
        return getattr(owner, name)  # type: ignore[no-any-return]

    def value(self) -> Tensor:
        """`W Q`, as a plain tensor."""
        adapters = self._adapters()
        rotated: Tensor = self.base() if adapters is None else call(adapters, weight=self.base())
        return rotated

    def _adapters(self) -> nn.Module | None:
        return self._layer._modules.get(REFLECTION)

    def _trained(self) -> list[nn.Parameter]:
        """What gets a gradient through this weight."""
        adapters = self._adapters()
        every = [] if adapters is None else [*adapters.parameters(), self.base()]
        return [tensor for tensor in every if isinstance(tensor, nn.Parameter) and tensor.requires_grad]

    def __imul__(self, other: Any) -> NoReturn:  # type: ignore[misc]
        """`layer.weight *= 2` would scale `W` and then assign the result, which is refused."""
        _refuse(Tensor.__imul__, self)

    def __itruediv__(self, other: Any) -> NoReturn:  # type: ignore[misc]
        """As `*=`."""
        _refuse(Tensor.__itruediv__, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """The rotated weight of the copied layer."""
        return type(self)(copy.deepcopy(self._layer, memo))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Its class and shape; values are not computed."""
        return f"RotatedWeight({', '.join(map(str, self.shape))})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer from the base weight, or compute with `W Q`."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(args[0].base(), *args[1:], **kwargs)
        if func in _FLAGS:
            return _answer_flag(func, args, kwargs)
        if func in _DETACHED:
            return DetachedRotatedWeight(args[0])
        if func is Tensor.data_ptr:  # by which accelerate knows tied parameters
            return func(args[0].value() if isinstance(args[0], DetachedRotatedWeight) else args[0].base())
        if func is Tensor.__repr__:
            return args[0].__repr__()
        if _scales(func, args, kwargs):
            return _scale(func, *args)
        if not torch.compiler.is_compiling() and _writes(func, args, kwargs):  # TorchDynamo does not trace the question
            _refuse(func, args, kwargs)
        return func(*compat.pytree.tree_map(_value, args), **compat.pytree.tree_map(_value, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Below autograd, where code in C++ or with torch functions disabled has read the weight."""
        if func is torch.ops.aten.detach.default:  # also `w.data`: writing into it raises an error
            return DetachedRotatedWeight(args[0])
        if _scales(func, args, kwargs or {}):
            return _scale(func, *args)
        found = [part for part in compat.pytree.tree_leaves((args, kwargs)) if isinstance(part, RotatedWeight)]
        if torch.is_grad_enabled() and any(not weight._is_linked and weight._trained() for weight in found):
            raise AdapterError(
                f"{func} reads the weight of an adapted layer below autograd, so its adapters would not get gradients. "
                "Call it under torch.no_grad(), or exclude the layer with exclude_modules."
            )
        if _writes_by_schema(func, args, kwargs or {}):
            _refuse(func, args, kwargs)
        with torch.no_grad():
            return func(*compat.pytree.tree_map(_value, args), **compat.pytree.tree_map(_value, kwargs or {}))


class DetachedRotatedWeight(RotatedWeight):
    """`layer.weight.data` and `layer.weight.detach()`: the current values, in separate memory, without a gradient.

    Writing into it is refused, as into the weight itself.
    """

    _now: Tensor

    @staticmethod
    def __new__(cls, weight: RotatedWeight) -> DetachedRotatedWeight:
        """The values of a rotated weight."""
        with torch.no_grad():
            values = weight.value().detach()
        made: DetachedRotatedWeight = compat.subclass_of(cls, values)
        made._layer, made._now = weight._layer, values
        return made

    def value(self) -> Tensor:
        """The values, as a plain tensor."""
        return self._now

    def _trained(self) -> list[nn.Parameter]:
        return []

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """The values, as a plain tensor."""
        return self._now.clone()


class InferenceRotatedWeight(RotatedWeight):
    """The same if no gradient is needed, without overriding torch functions.

    torch takes the fast path through `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` only with such weights.
    """

    __torch_function__ = compat.disabled_torch_function


def _answer(name: str, func: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: InferenceRotatedWeight, *args: Any, **kwargs: Any) -> Any:
        return RotatedWeight.__torch_function__(func, (), (self, *args), kwargs)

    method.__name__ = name
    return method


# These do not reach the dispatcher: without torch functions they would act on the empty tensor that stands for W Q.
for _name in (
    *("numpy", "tolist", "data_ptr", "untyped_storage", "requires_grad_", "share_memory_", "apply_", "map_"),
    *("__setitem__", "__reduce_ex__", "__dlpack__"),
):
    setattr(InferenceRotatedWeight, _name, _answer(_name, getattr(Tensor, _name)))
for _name in ("data", "requires_grad", "grad"):
    _get, _set = (_answer(_name, getattr(getattr(Tensor, _name), side)) for side in ("__get__", "__set__"))
    setattr(InferenceRotatedWeight, _name, property(_get, _set))


def _value(value: Any) -> Any:
    return value.value() if isinstance(value, RotatedWeight) else value


def link(layer: nn.Module, kind: type[RotatedWeight] = RotatedWeight) -> RotatedWeight:
    """The weight of a layer, with a gradient to its adapters for those readers too that compute their own.

    Torch functions compute with `W Q`, and autograd sees that. The forward of a custom `torch.autograd.Function` runs
    without gradients: what its backward returns for the weight comes back here.
    """
    weight = kind(layer)
    if trained := weight._trained():
        weight = _Link.apply(layer, kind, *trained)  # type: ignore[no-untyped-call]
        weight._is_linked = True
    return weight


class _Link(torch.autograd.Function):
    """`(layer, class of the result, parameters that are trained) -> W Q`; its backward is that of `W Q`."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, kind: type[RotatedWeight], *trained: nn.Parameter) -> RotatedWeight:
        ctx.layer, ctx.trained = layer, trained
        return kind(layer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # create_graph=True
        with torch.enable_grad():
            rotated = RotatedWeight(ctx.layer).value()
        gradients = torch.autograd.grad(rotated, ctx.trained, grad, create_graph=again, allow_unused=True)
        return None, None, *gradients


def _answer_flag(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`requires_grad`, `grad` and `is_leaf` of the base weight; a detached weight has none of them."""
    weight: RotatedWeight = args[0]
    if not isinstance(weight, DetachedRotatedWeight):
        answer = func(weight.base(), *args[1:], **kwargs)
        return weight if func is Tensor.requires_grad_ else answer
    if func.__name__ == "__get__":
        return func(weight.base().detach())
    raise AdapterError(
        "The weight of an adapted layer is computed as W Q at each read, so it cannot become a parameter or another "
        "leaf of autograd. Copy its values first: `layer.weight.detach().clone()`."
    )


def _scales(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function multiplies or divides a rotated weight by one number, in place."""
    if func not in _SCALING or len(args) != 2 or kwargs or not isinstance(args[0], RotatedWeight):
        return False
    factor = args[1]
    return not isinstance(factor, Tensor) or (factor.dim() == 0 and type(factor) is Tensor and not factor.requires_grad)


def _scale(func: Callable[..., Any], weight: RotatedWeight, factor: Any) -> RotatedWeight:
    """Scale `W`, and the values that have been computed of it."""
    func(weight.base(), factor)
    if isinstance(weight, DetachedRotatedWeight):
        func(weight._now, factor)
    return weight


def _writes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into a rotated weight: `w.add_(...)`, `w[...] = ...`, `w.data = ...`, `out=w`."""
    first = args[0] if args else next(iter(kwargs.values()), None)  # torch.nn.init passes its tensor by name
    if isinstance(first, (list, tuple)):  # torch._foreach_add_
        first = next((part for part in first if isinstance(part, RotatedWeight)), None)
    if isinstance(kwargs.get("out"), RotatedWeight):
        return True
    name = getattr(func, "__name__", "")
    in_place = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
    augmented = name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__")
    return (in_place or augmented or kwargs.get("inplace") is True) and isinstance(first, RotatedWeight)


def _writes_by_schema(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator of the dispatcher writes into a rotated weight."""
    schema = compat.schema_of(func)  # operators of higher order have none
    arguments = schema.arguments if schema is not None and schema.is_mutable else ()
    written = [
        kwargs.get(argument.name, args[place] if place < len(args) else None)
        for place, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return any(isinstance(part, RotatedWeight) for part in compat.pytree.tree_leaves(written))


def _refuse(func: Callable[..., Any], *given: Any) -> NoReturn:
    weight = next(part for part in compat.pytree.tree_leaves(given) if isinstance(part, RotatedWeight))
    owner, name = weight_place(weight._layer)
    raise AdapterError(
        f"{type(owner).__name__}.{name}: {getattr(func, '__name__', func)} writes into the "
        "weight of an adapted layer, which is computed as W Q at each read, so the change would be lost. Write to "
        "`layer.hra_base`, or call hra_fx.fold(model) first."
    )
