"""How the code of a model uses the weights of its layers: it calls them, reads their values, or writes into them.

    self.qkv(x)                                calls a layer
    F.linear(x, self.qkv.weight)               reads values, so the weight must be W Q
    x.to(self.wo.weight.dtype)                 only asks for metadata, so the parameter is enough
    block.attention.output.weight.div_(2)      writes, so the weight must be the parameter

The chains of attributes come from the bytecode of `forward`, and of the methods and functions that it uses.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import nn

#: A variable and the attributes after it: `("self", "qkv", "weight")`.
Chain: TypeAlias = tuple[str, ...]

#: Attributes and methods of a tensor that do not depend on its values.
METADATA = frozenset(
    ("__class__", "data_ptr", "device", "dim", "dtype", "element_size", "is_cuda", "is_floating_point", "ndim", "numel")
) | {"requires_grad", "shape", "size"}
#: Functions that ask an object what it is.
_ASKING = (("isinstance",), ("hasattr",))
_WEIGHTS = ("weight", "in_proj_weight")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_VARIABLES = ("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CLOSURE")
#: The attributes in which properties, cached properties and class methods store their function.
_FUNCTIONS = ("fget", "func", "__func__")
_CHAINS: WeakKeyDictionary[type, frozenset[Chain]] = WeakKeyDictionary()


def chains_of(cls: type[nn.Module]) -> frozenset[Chain]:
    """All chains in the forward of a class, and in the methods, properties and functions that it uses."""
    if cls not in _CHAINS:
        waiting, found = list(_methods(cls, "forward")), set[Chain]()
        for function in waiting:  # the list grows during the loop
            chains = set(_chains_in(function.__code__, "".join(function.__code__.co_varnames[:1])))
            found |= chains
            used = {method for chain in chains if chain[0] == "self" for method in _methods(cls, chain[1])}
            named = map(function.__globals__.get, function.__code__.co_names)
            # Not those of torch, which are not a model's code.
            used |= {f for f in named if isinstance(f, FunctionType) and not f.__module__.startswith("torch.")}
            waiting += used.difference(waiting)
        _CHAINS[cls] = frozenset(found)
    return _CHAINS[cls]


def reads_weights(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class uses values of the weights of other modules."""
    return any(use not in METADATA for _, use in _uses(chains_of(cls)))


def needs_parameter(name: str, classes: Iterable[type[nn.Module]]) -> bool:
    """Whether code that reads the weight of a layer with this name means the parameter.

    It does if the code writes into the weight, as RWKV does between train and eval mode, or if it only asks for
    metadata, as T5 does: computing `W Q` for that would take longer than the layer.
    """
    uses = {use for cls in classes for owner, use in _uses(chains_of(cls)) if owner == name}
    return any(map(_is_write, uses)) or (bool(uses) and uses <= METADATA)


def _uses(chains: Iterable[Chain]) -> Iterator[tuple[str, str]]:
    """The name of a layer, and what follows after its weight; empty if the weight itself is used."""
    for chain in chains:
        for place, name in enumerate(chain):
            # `self.weight` is a module's own weight.
            if name in _WEIGHTS and place > 0 and chain[:place] != ("self",):
                yield chain[place - 1], chain[place + 1] if len(chain) > place + 1 else ""


def _is_write(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _methods(cls: type[nn.Module], name: str) -> Iterator[FunctionType]:
    """The methods and properties with this name, including those that `super()` finds."""
    for base in cls.__mro__:
        found: Any = None if base is nn.Module else vars(base).get(name)
        held = (getattr(found, own, None) for own in _FUNCTIONS)
        found = next((function for function in held if function is not None), found)
        found = inspect.unwrap(found) if callable(found) else None
        if isinstance(found, FunctionType):
            yield found


def _chains_in(code: CodeType, receiver: str) -> Iterator[Chain]:
    """The chains in some code, in which `receiver` is the name of the module."""
    chain: Chain = ()
    before: Chain = ()  # the function of a call, if the chain is its first argument
    for step in dis.get_instructions(code):
        if step.opname in _ATTRIBUTES:
            chain = (*(chain or ("",)), step.argval)
            continue
        if len(chain) > 1:
            yield (*chain, "__class__") if before in _ASKING else chain
        before, chain = chain, ()
        if step.opname.startswith(_VARIABLES):  # some instructions load two variables
            name = step.argval if isinstance(step.argval, str) else step.argval[-1]
            chain = ("self" if name == receiver else name,)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _chains_in(inner, receiver)
