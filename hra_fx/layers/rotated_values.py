"""Values of `W Q` that other code has moved, copied or viewed: a plain tensor that knows from which layer it is."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.errors import AdapterError

T = TypeVar("T")

#: They give the same memory as they get, without its autograd history.
_DETACHING = frozenset([Tensor.data.__get__, Tensor.detach, torch.detach])  # type: ignore[attr-defined]
#: Scaling `W Q` is scaling `W`. RWKV divides weights in place when it changes between train and eval mode.
_SCALING = frozenset(
    [
        *(Tensor.mul_, Tensor.div_, torch.ops.aten.mul_.Tensor, torch.ops.aten.div_.Tensor),
        *(torch.ops.aten.mul_.Scalar, torch.ops.aten.div_.Scalar),
    ]
)
_FLAGS = frozenset([getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")])
#: What moves or copies a tensor, and changes at most its dtype.
MOVES = _DETACHING.union(
    (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory, Tensor.clone, torch.clone, Tensor.contiguous),
    (Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type, Tensor.type_as),
)


class RotatedValues(Tensor):
    """Values of `layer.weight`: moved, copied, detached, or a view of them such as a row.

    Code that moves a model reads a parameter, moves it, and stores the result as the parameter. In the layer that they
    are from, stored values become the base weight `W`, moved in the same way (`become_base`). Anywhere else they are
    values of `W Q`.

    Attributes:
        weight: the rotated weight that was read.
        base: the base weight at that time.
        move: what was done with it since, or `None` if these values are only a part of it.
        is_copy: whether they can be written. Otherwise a write would be lost, because the layer does not see it.
        is_moved: whether `move` did more than to detach.
    """

    weight: Any
    base: Tensor
    move: Callable[[Tensor], Tensor] | None
    is_copy: bool
    is_moved: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with plain tensors; remember moves, and refuse writes that would be lost."""
        kwargs = kwargs or {}
        if any(getattr(kind, "computes_when_used", False) for kind in types):
            return NotImplemented  # a rotated weight computes its values, and calls again
        if func in (Tensor.__repr__, Tensor.__reduce_ex__):
            return func(args[0].plain(), *args[1:], **kwargs)
        if func is Tensor.requires_grad_:
            args[0].check_leaf()
        elif scales_by_number(func, args, kwargs) and args[0].is_detached():
            func(args[0].base, args[1])
        elif func not in _FLAGS:
            for part in written(func, args, kwargs, cls):
                part.release(func)
        result = compat.disabled_torch_function(func, (), args, kwargs)
        if func in MOVES and type(args[0]) is cls and args[0].move is not None:
            return _moved(args[0], func, args, kwargs, result)
        read_only = [(part.weight, part) for part in args if type(part) is cls and not part.is_copy]
        return views_of(read_only, result)

    def plain(self) -> Any:
        """The same values as a plain tensor or parameter."""
        values: Tensor = compat.disabled_torch_function(Tensor.as_subclass, (), (self, Tensor), {})
        return nn.Parameter(values.detach(), self.requires_grad) if isinstance(self, nn.Parameter) else values

    def release(self, func: Any) -> None:
        """Turn this into a plain tensor before something writes into it.

        Raises:
            AdapterError: the write would be lost.
        """
        is_parameter = isinstance(self, nn.Parameter)
        if not self.is_copy and not is_parameter:
            self.weight.refuse(func)
        self.__class__ = nn.Parameter if is_parameter else Tensor  # type: ignore[assignment]

    def is_detached(self) -> bool:
        """Whether these are the values of the weight itself, as `.data` and `detach` give them."""
        return self.move is not None and not self.is_moved

    def check_leaf(self) -> None:
        """Refuse to make the weight of a layer, which may be detached, a leaf of autograd.

        Raises:
            AdapterError: always, except for values that were moved or copied.
        """
        if self.is_detached():
            raise AdapterError(
                "The weight of an adapted layer is computed as W Q at each read, so it cannot become a parameter or "
                "another leaf of autograd. Copy its values first: `layer.weight.detach().clone()`."
            )

    def __imul__(self, other: Any) -> Tensor:  # type: ignore[misc]
        """`layer.weight.data *= 2` would scale `W` and then assign the result, which is refused."""
        self.release(Tensor.__imul__)
        return Tensor.__imul__(self, other)

    def __itruediv__(self, other: Any) -> Tensor:  # type: ignore[misc]
        """As `*=`."""
        self.release(Tensor.__itruediv__)
        return Tensor.__itruediv__(self, other)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain copy."""
        values: Tensor = self.plain()
        return copy.deepcopy(values, memo) if values.is_leaf else values.clone()


def _make(weight: Any, values: Tensor, **attributes: Any) -> RotatedValues:
    made = values.as_subclass(RotatedValues)
    vars(made).update(weight=weight, **attributes)
    return made


def moved_weight(weight: Any, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """What a function of `MOVES` gives for a rotated weight, its first argument."""
    base = weight.base()

    def move(tensor: Tensor) -> Tensor:
        moved: Tensor = func(tensor, *args[1:], **kwargs)
        return moved

    if any(str(value) == "meta" for value in (*args[1:], *kwargs.values())):
        values = result = move(base.detach())  # no values are needed
    else:
        values = weight.value()
        result = move(values)
    if values is base or type(result) is not Tensor:  # no adapter acts anymore; a DTensor
        return result
    own = func not in _DETACHING and not _shares_memory(result, values)
    return _make(weight, result, base=base, move=move, is_copy=own, is_moved=func not in _DETACHING)


def _moved(before: RotatedValues, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> Tensor:
    """As `moved_weight`, for values that were moved before."""
    if result is before:
        before.is_moved = True
        return before

    def move(tensor: Tensor) -> Tensor:
        moved: Tensor = func(before.move(tensor), *args[1:], **kwargs)  # type: ignore[misc]
        return moved

    own = before.is_copy or (func not in _DETACHING and not _shares_memory(result, before))
    return _make(
        before.weight,
        result,
        base=before.base,
        move=move,
        is_copy=own,
        is_moved=before.is_moved or func not in _DETACHING,
    )


def views_of(values: Sequence[tuple[Any, Tensor]], result: Any) -> Any:
    """A result, with its views of computed values marked as such, so that a write into them is not silently lost.

    Args:
        values: rotated weights, with their values.
        result: a nested container, some of whose tensors may be views of the values.
    """

    def mark(part: Any) -> Any:
        if type(part) is not Tensor:
            return part
        weight = next((weight for weight, own in values if _shares_memory(part, own)), None)
        return part if weight is None else _make(weight, part, move=None, is_copy=False, is_moved=False)

    return compat.pytree.tree_map(mark, result) if values else result


def scales_by_number(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function multiplies or divides its first argument by one number, in place."""
    if func not in _SCALING or len(args) != 2 or kwargs:
        return False
    factor = args[1]
    return not isinstance(factor, Tensor) or (factor.dim() == 0 and type(factor) is Tensor and not factor.requires_grad)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    with contextlib.suppress(
        RuntimeError, NotImplementedError
    ):  # tensors without memory: meta, lazy, sparse, functorch
        address = one.untyped_storage().data_ptr()
        return address != 0 and address == other.untyped_storage().data_ptr()
    return False


def become_base(values: RotatedValues) -> nn.Parameter:
    """The base weight, moved as these values of `W Q` were: the same object where its class allows it."""
    base = values.move(values.base.detach())  # type: ignore[misc]
    if type(base) is not Tensor:
        return base  # type: ignore[return-value]  # quantized
    values.__class__ = nn.Parameter  # type: ignore[assignment]
    values.data = base
    return values  # type: ignore[return-value]


def written(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], kind: type[T]) -> list[T]:
    """The tensors of a class that a function writes into: `w.add_(...)`, `w[...] = ...`, `w.data = ...`, `out=w`."""
    first = args[0] if args else next(iter(kwargs.values()), None)  # torch.nn.init passes its tensor by name
    name = getattr(func, "__name__", "")
    in_place = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
    augmented = name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__")
    into = [first] if in_place or augmented or kwargs.get("inplace") is True else []
    found = compat.pytree.tree_leaves((into, kwargs.get("out")))  # torch._foreach_add_ takes a list
    return [part for part in found if isinstance(part, kind)]
