"""Values of `W Q` that other code has moved, copied or viewed: a tensor that refers to its layer."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from hra_fx import compat
from hra_fx.errors import AdapterError
from hra_fx.layers.target import weight_place

T = TypeVar("T")

#: Functions that return the same memory without its autograd history.
_DETACHING = frozenset([Tensor.data.__get__, Tensor.detach, torch.detach])  # type: ignore[attr-defined]
#: Scaling `W Q` is the same as scaling `W`. RWKV divides weights in place when it switches between train and eval mode.
_SCALING = frozenset(
    [
        *(Tensor.mul_, Tensor.div_, torch.ops.aten.mul_.Tensor, torch.ops.aten.div_.Tensor),
        *(torch.ops.aten.mul_.Scalar, torch.ops.aten.div_.Scalar),
    ]
)
_FLAGS = frozenset([getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")])
#: Functions that move or copy a tensor, and change at most its dtype.
MOVES = _DETACHING.union(
    (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory, Tensor.clone, torch.clone, Tensor.contiguous),
    (Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type, Tensor.type_as),
)
#: Functions that moved a tensor, with their other arguments.
_Moves: TypeAlias = tuple[tuple[Callable[..., Tensor], Sequence[Any], dict[str, Any]], ...]


class Moved(NamedTuple):
    """The functions that created a parameter from the weight of a layer, and the base weight at that time."""

    layer: weakref.ref[nn.Module]
    base: Tensor
    moves: _Moves


#: Parameters with values of `W Q`. They become the base weight if they are stored as the weight of their layer.
MOVED: Any = WeakIdKeyDictionary()


class RotatedValues(Tensor):
    """Values of `layer.weight` that were moved, copied or detached, or a view of them such as a row.

    Code that moves a model reads a parameter, moves it, creates a new parameter from it, and stores that. If these
    values are stored as the weight of their layer, they become the base weight `W`, moved in the same way
    (`hra_fx.layers.base_parameters`). Everywhere else they are values of `W Q`, and a parameter created from them is an
    ordinary parameter.

    Attributes:
        layer: a weak reference to the layer that the weight was read from.
        moves: the functions that were applied since then, or `None` if these values are only a part of the weight.
        is_copy: whether the values can be written. Otherwise a write would be lost, because the layer does not see it.
    """

    layer: weakref.ref[nn.Module]
    moves: _Moves | None
    is_copy: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with plain tensors, record moves, and raise an error for writes that would be lost."""
        kwargs = kwargs or {}
        if any(getattr(cls, "computes_when_used", False) for cls in types):
            return NotImplemented  # a rotated weight computes its values, and calls again
        if func in (Tensor.__repr__, Tensor.__reduce_ex__):
            return func(args[0].plain(), *args[1:], **kwargs)
        if func is Tensor.requires_grad_:
            args[0].check_leaf()
        elif scales_by_number(func, args, kwargs) and args[0].is_detached() and args[0].layer() is not None:
            func(args[0].layer().hra_base, args[1])
        elif func not in _FLAGS:
            for part in written(func, args, kwargs, cls):
                part.release(func)
        result = compat.disabled_torch_function(func, (), args, kwargs)
        if func in MOVES and type(args[0]) is cls and args[0].moves is not None:
            return _moved(args[0], func, args, kwargs, result)
        return views_of([(part.layer, part) for part in args if type(part) is cls and not part.is_copy], result)

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """Make the values an ordinary parameter, as `nn.Parameter` requests. `MOVED` records its origin."""
        layer, moves = self.layer(), self.moves
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        if layer is not None and moves:
            MOVED[self] = Moved(self.layer, layer.hra_base, moves)  # type: ignore[arg-type]
        for name in RotatedValues.__annotations__:
            vars(self).pop(name)

    def plain(self) -> Tensor:
        """The same values as a plain tensor."""
        values: Tensor = compat.disabled_torch_function(Tensor.as_subclass, (), (self, Tensor), {})
        return values

    def release(self, func: Any) -> None:
        """Turn this into a plain tensor before a write. Raises an error if the write would be lost."""
        if not self.is_copy and (layer := self.layer()) is not None:
            refuse_write(layer, func)
        self.__class__ = Tensor  # type: ignore[assignment]

    def is_detached(self) -> bool:
        """Whether these are the values of the weight itself, from `.data` or `detach`."""
        return self.moves is not None and all(func in _DETACHING for func, _, _ in self.moves)

    def check_leaf(self) -> None:
        """Raise an error if these are the values of the weight itself, which cannot become a leaf of autograd."""
        if self.is_detached():
            raise AdapterError(
                "The weight of an adapted layer is computed as W Q at each read, so it cannot become a parameter or "
                "another leaf of autograd. Copy its values first: `layer.weight.detach().clone()`."
            )

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Handle `set_`, which does not call `__torch_function__`."""
        self.release(Tensor.set_)
        return self.set_(*args, **kwargs)

    def __imul__(self, other: Any) -> Tensor:  # type: ignore[misc]
        """Raise an error: `layer.weight.data *= 2` would scale `W` and then try to assign the result."""
        self.release(Tensor.__imul__)
        return Tensor.__imul__(self, other)

    def __itruediv__(self, other: Any) -> Tensor:  # type: ignore[misc]
        """Raise an error, like `*=`."""
        self.release(Tensor.__itruediv__)
        return Tensor.__itruediv__(self, other)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a plain copy."""
        values = self.plain()
        return copy.deepcopy(values, memo) if values.is_leaf else values.clone()


def _make(layer: weakref.ref[nn.Module], values: Tensor, moves: _Moves | None, *, is_copy: bool) -> RotatedValues:
    made = values.as_subclass(RotatedValues)
    made.layer, made.moves, made.is_copy = layer, moves, is_copy
    return made


def moved_weight(weight: Any, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The result of a function in `MOVES` for a rotated weight as its first argument."""
    base, rest = weight.base(), tuple(args[1:])
    result: Tensor
    if any(str(value) == "meta" for value in (*rest, *kwargs.values())):
        values = result = func(base.detach(), *rest, **kwargs)  # the values of W Q are not needed
    else:
        values = weight.value()
        result = func(values, *rest, **kwargs)
    if values is base or type(result) is not Tensor:  # no adapter is active anymore, or a DTensor
        return result
    is_copy = func not in _DETACHING and not _shares_memory(result, values)
    return _make(weakref.ref(weight._layer), result, ((func, rest, kwargs),), is_copy=is_copy)


def _moved(before: RotatedValues, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> Tensor:
    """Like `moved_weight`, for values that were already moved."""
    moves = (*(before.moves or ()), (func, tuple(args[1:]), kwargs))
    if result is before:
        before.moves = moves
        return before
    is_copy = before.is_copy or (func not in _DETACHING and not _shares_memory(result, before))
    return _make(before.layer, result, moves, is_copy=is_copy)


def moved_base(origin: Moved) -> Tensor:
    """The base weight, moved in the same way as a parameter with values of `W Q`."""
    moved = origin.base.detach()
    for func, rest, kwargs in origin.moves:
        moved = func(moved, *rest, **kwargs)
    return moved


def views_of(values: Sequence[tuple[weakref.ref[nn.Module], Tensor]], result: Any) -> Any:
    """Mark views of the computed values of layers in a nested result, so that a write into them is not lost."""

    def mark(part: Any) -> Any:
        if type(part) is not Tensor:
            return part
        layer = next((layer for layer, own in values if _shares_memory(part, own)), None)
        return part if layer is None else _make(layer, part, None, is_copy=False)

    return compat.pytree.tree_map(mark, result) if values else result


def refuse_write(layer: nn.Module, func: Any) -> NoReturn:
    """Raise an error for a write into the rotated weight of a layer."""
    owner, name = weight_place(layer)
    raise AdapterError(
        f"{type(owner).__name__}.{name}: {getattr(func, '__name__', func)} writes into the "
        "weight of an adapted layer, which is computed as W Q at each read, so the change would be lost. Write to "
        "`layer.hra_base`, or call hra_fx.fold(model) first."
    )


def scales_by_number(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function multiplies or divides its first argument by a number, in place."""
    if func not in _SCALING or len(args) != 2 or kwargs:
        return False
    factor = args[1]
    return not isinstance(factor, Tensor) or (factor.dim() == 0 and type(factor) is Tensor and not factor.requires_grad)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    with contextlib.suppress(RuntimeError, NotImplementedError):  # sparse, and other tensors without memory
        address = one.untyped_storage().data_ptr()
        return address != 0 and address == other.untyped_storage().data_ptr()
    return False


def written(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], cls: type[T]) -> list[T]:
    """The tensors of a class that a function writes into: `w.add_(...)`, `w[...] = ...`, `w.data = ...`, `out=w`."""
    first = args[0] if args else next(iter(kwargs.values()), None)  # torch.nn.init passes its tensor by name
    name = getattr(func, "__name__", "")
    in_place = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
    augmented = name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__")
    into = [first] if in_place or augmented or kwargs.get("inplace") is True else []
    found = compat.pytree.tree_leaves((into, kwargs.get("out")))  # torch._foreach_add_ takes a list
    return [part for part in found if isinstance(part, cls)]
