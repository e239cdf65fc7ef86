"""`layer.weight` of an adapted layer. Reading it gives `W Q`, which is computed when it is used."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.errors import AdapterError
from hra_fx.kernels.dispatch import is_plain_eager
from hra_fx.layers.rotated_values import MOVES, moved_weight, refuse_write, scales_by_number, views_of, written
from hra_fx.layers.sharding import call
from hra_fx.layers.target import REFLECTION, weight_place

#: Functions that use the base weight, because their result does not depend on its values.
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
#: Attributes of the base weight: code that freezes a weight or clears its gradient means the parameter.
_FLAGS = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad")),
        *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
        Tensor.requires_grad_,
    ]
)


#: Attribute of an adapted layer that shares its base weight with another module.
TIED = "_hra_tied"


class RotatedWeight(Tensor):
    """The weight of an adapted layer as other code sees it: a tensor with the values `W Q`.

    It has the metadata (shape, dtype, device) of the base weight. Any other operation first computes `W Q`, with
    gradients for the adapters that are active at that time: like a parameter, a stored weight follows its layer.
    Multiplying it by a number in place scales `W`. Other writes, also into a view, raise an error, because the result
    would be lost: write to `layer.hra_base`, or fold first. Functions that move or copy it return `RotatedValues`.
    """

    computes_when_used = True
    _layer: nn.Module
    _is_linked: bool = False

    @staticmethod
    def __new__(cls, layer: nn.Module) -> RotatedWeight:
        """Represent the weight of `layer`, which has an active adapter."""
        made: RotatedWeight = compat.wrapper_tensor(cls, layer.hra_base)  # type: ignore[arg-type]
        made._layer = layer
        return made

    @property
    def _is_param(self) -> bool:  # type: ignore[override]
        """Whether `isinstance(weight, nn.Parameter)` is true, so that it can be assigned to another module.

        It is true if other modules share the base weight: accelerate reads the weight of one module and assigns it to
        the others.
        """
        return TIED in vars(self._layer)

    def base(self) -> Tensor:
        """The base weight `W`, or the weight of the plain layer after adapters are folded or deleted."""
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
        """The parameters that get a gradient through this weight."""
        adapters = self._adapters()
        every = [] if adapters is None else [*adapters.parameters(), self.base()]
        return [tensor for tensor in every if isinstance(tensor, nn.Parameter) and tensor.requires_grad]

    def __imul__(self, other: Any) -> NoReturn:  # type: ignore[misc]
        """Raise an error: `layer.weight *= 2` would scale `W` and then try to assign the result."""
        refuse_write(self._layer, Tensor.__imul__)

    def __itruediv__(self, other: Any) -> NoReturn:  # type: ignore[misc]
        """Raise an error, like `*=`."""
        refuse_write(self._layer, Tensor.__itruediv__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return the rotated weight of the copied layer."""
        return type(self)(copy.deepcopy(self._layer, memo))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Show the class and shape, without computing values."""
        return f"RotatedWeight({', '.join(map(str, self.shape))})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Use the base weight for metadata, and `W Q` for everything else."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(args[0].base(), *args[1:], **kwargs)
        if func in _FLAGS:
            return _answer_flag(func, args, kwargs)
        if func is Tensor.data_ptr:  # accelerate uses it to find tied parameters
            return func(args[0].base())
        if func is Tensor.__repr__:
            return args[0].__repr__()
        if _scales(func, args, kwargs):
            return _scale(func, *args)
        if not torch.compiler.is_compiling():  # TorchDynamo cannot trace these checks
            for weight in written(func, args, kwargs, RotatedWeight):
                refuse_write(weight._layer, func)
        if func in MOVES and is_plain_eager() and isinstance(args[0], RotatedWeight):
            return moved_weight(args[0], func, args, kwargs)
        return _computed(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Handle reads below autograd, from C++ code or from code with torch functions disabled."""
        if _scales(func, args, kwargs or {}):
            return _scale(func, *args)
        found = [part for part in compat.pytree.tree_leaves((args, kwargs)) if isinstance(part, RotatedWeight)]
        if torch.is_grad_enabled() and any(not weight._is_linked and weight._trained() for weight in found):
            raise AdapterError(
                f"{func} reads the weight of an adapted layer below autograd, so its adapters would not get gradients. "
                "Call it under torch.no_grad(), or exclude the layer with exclude_modules."
            )
        for weight in _written_by_schema(func, args, kwargs or {}):
            refuse_write(weight._layer, func)
        with torch.no_grad():
            return _computed(func, args, kwargs or {})


class InferenceRotatedWeight(RotatedWeight):
    """A `RotatedWeight` that does not override torch functions, for use without gradients.

    torch takes the fast path through `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` only with such weights.
    """

    __torch_function__ = compat.disabled_torch_function


def _answer(name: str, func: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: InferenceRotatedWeight, *args: Any, **kwargs: Any) -> Any:
        return RotatedWeight.__torch_function__(func, (), (self, *args), kwargs)

    method.__name__ = name
    return method


# These functions do not reach the dispatcher directly. Without torch functions, they would act on the empty tensor that
# represents W Q, or move values without a record that they are W Q.
for _name in (
    *("numpy", "tolist", "data_ptr", "untyped_storage", "requires_grad_", "share_memory_", "apply_", "map_"),
    *("__setitem__", "__reduce_ex__", "__dlpack__"),
    *{_move.__name__ for _move in MOVES if hasattr(Tensor, _move.__name__)} - {"__get__"},
):
    setattr(InferenceRotatedWeight, _name, _answer(_name, getattr(Tensor, _name)))
for _name in ("data", "requires_grad", "grad"):
    _get, _set = (_answer(_name, getattr(getattr(Tensor, _name), side)) for side in ("__get__", "__set__"))
    setattr(InferenceRotatedWeight, _name, property(_get, _set))


def link(layer: nn.Module, cls: type[RotatedWeight] = RotatedWeight) -> RotatedWeight:
    """The weight of a layer. Its adapters also get a gradient from code that computes its own gradients.

    Torch functions compute with `W Q`, which autograd records. But the forward of a custom `torch.autograd.Function`
    runs without gradients. The gradient that its backward returns for the weight is passed on here.
    """
    weight = cls(layer)
    if trained := weight._trained():
        weight = _Link.apply(layer, cls, *trained)  # type: ignore[no-untyped-call]
        weight._is_linked = True
    return weight


class _Link(torch.autograd.Function):
    """`(layer, class of the result, trained parameters) -> W Q`, with the backward of `W Q`."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, cls: type[RotatedWeight], *trained: nn.Parameter) -> RotatedWeight:
        ctx.layer, ctx.trained = layer, trained
        return cls(layer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # create_graph=True
        with torch.enable_grad():
            rotated = RotatedWeight(ctx.layer).value()
        gradients = torch.autograd.grad(rotated, ctx.trained, grad, create_graph=again, allow_unused=True)
        return None, None, *gradients


def _answer_flag(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`requires_grad`, `grad` and `is_leaf` of the base weight."""
    answer = func(args[0].base(), *args[1:], **kwargs)
    return args[0] if func is Tensor.requires_grad_ else answer


def _scales(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return scales_by_number(func, args, kwargs) and isinstance(args[0], RotatedWeight)


def _scale(func: Callable[..., Any], weight: RotatedWeight, factor: Any) -> RotatedWeight:
    func(weight.base(), factor)
    return weight


def _computed(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a function with the values `W Q`."""
    found: list[tuple[weakref.ref[nn.Module], Tensor]] = []

    def value(part: Any) -> Any:
        if not isinstance(part, RotatedWeight):
            return part
        values = part.value()
        if values is not part.base():
            found.append((weakref.ref(part._layer), values))
        return values

    result = func(*compat.pytree.tree_map(value, args), **compat.pytree.tree_map(value, kwargs))
    return views_of(found, result) if is_plain_eager() else result


def _written_by_schema(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[RotatedWeight]:
    """The rotated weights that an operator of the dispatcher writes into."""
    schema = compat.schema_of(func)  # higher-order operators do not have a schema
    arguments = schema.arguments if schema is not None and schema.is_mutable else ()
    into = [
        kwargs.get(argument.name, args[place] if place < len(args) else None)
        for place, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [part for part in compat.pytree.tree_leaves(into) if isinstance(part, RotatedWeight)]
