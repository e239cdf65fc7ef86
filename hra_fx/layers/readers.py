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
from collections.abc import Collection, Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import nn

#: A variable and the attributes after it: `("self", "qkv", "weight")`.
Chain: TypeAlias = tuple[str, ...]

#: Attributes and methods of a tensor that do not depend on its values.
METADATA = frozenset(
    ("__class__", "data_ptr", "device", "dim", "dtype", "element_size", "is_cuda", "is_floating_point", "ndim", "numel")
) | {"requires_grad", "shape", "size"}
#: Functions that only ask for the type or the attributes of an object.
_ASKING = (("isinstance",), ("hasattr",))
_METADATA_USES = {(name,) for name in METADATA}
_WEIGHTS = ("weight", "in_proj_weight")
_WEIGHT_CHAINS = {(name,) for name in _WEIGHTS}
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_VARIABLES = ("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CLOSURE")
#: The attributes in which properties, cached properties and class methods store their function.
_FUNCTIONS = ("fget", "func", "__func__")
_CHAINS: WeakKeyDictionary[type, frozenset[Chain]] = WeakKeyDictionary()


def chains_of(cls: type[nn.Module]) -> frozenset[Chain]:
    """All chains in the forward of a class, and in the methods, properties and functions that it uses."""
    if cls not in _CHAINS:
        waiting, found = list(_methods(cls, "forward")), set[Chain]()
        methods = set(waiting)
        for function in waiting:  # the list grows during the loop
            is_method = function in methods
            receiver = "".join(function.__code__.co_varnames[:1]) if is_method else ""  # usually "self"
            chains = set(_chains_in(function.__code__, receiver))
            found |= chains
            # The variable is empty after a call, as in `super().attend(x)`.
            used = {method for chain in chains if chain[0] in ("self", "") for method in _methods(cls, chain[1])}
            methods |= used
            named = [function.__globals__.get(name) for name in function.__code__.co_names]
            modules = {chain[0]: function.__globals__.get(chain[0]) for chain in chains}
            named += [getattr(modules[v], a, None) for v, a, *_ in chains if isinstance(modules[v], ModuleType)]
            # Functions of torch are not code of the model.
            used |= {f for f in named if isinstance(f, FunctionType) and not str(f.__module__).startswith("torch.")}
            waiting += used.difference(waiting)
        _CHAINS[cls] = frozenset(found)
    return _CHAINS[cls]


def reads_weights(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class may use values of the weights of other modules."""
    return any(use[:1] not in _METADATA_USES for _, use in _uses(chains_of(cls)))


def needs_parameter(names: Collection[str], classes: Collection[type[nn.Module]]) -> bool:
    """Whether code that uses the weight of a layer with these names needs the parameter, not `W Q`.

    It does if the code writes into the weight and does not read it, as RWKV does between train and eval mode, or if it
    only uses metadata, as T5 does: computing `W Q` for that would take longer than the layer. A weight that is read by
    another name, such as that of a variable, may be the weight of this layer, so the code may need `W Q`.
    """
    uses = _uses_of(names, classes)
    if any(map(_is_write, uses)):
        return not any(map(_is_read, uses))
    others = {use for cls in classes for owner, use in _uses(chains_of(cls)) if owner is None}
    return bool(uses) and not any(map(_is_read, uses | others))


def why_lost(names: Collection[str], classes: Collection[type[nn.Module]], own: type[nn.Module] | None) -> str | None:
    """Return why writes into the weight of a layer in a forward would be lost, or `None`; without the final period."""
    uses = _uses_of(names, classes)
    chains = frozenset() if own is None else chains_of(own)
    uses |= {chain[2:] for chain in chains if chain[:1] == ("self",) and chain[1:2] in _WEIGHT_CHAINS}
    writes = [use for use in uses if _is_write(use)]
    if not writes or not any(map(_is_read, uses)):
        return None
    return (
        f"the forward writes into its weight (`weight.{'.'.join(writes[0]).rstrip('=')}`) and reads it. The weight is "
        "W Q while the model runs, so the change would be lost"
    )


def writes_parameters(model: nn.Module) -> bool:
    """Whether the code of a model may write into parameters when it runs."""
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    chains = (chain for cls in {type(part) for part in model.modules()} for chain in chains_of(cls))
    return any(name in names and _is_write(chain[place + 1 :]) for chain in chains for place, name in enumerate(chain))


def _uses_of(names: Collection[str], classes: Collection[type[nn.Module]]) -> set[Chain]:
    return {use for cls in classes for owner, use in _uses(chains_of(cls)) if owner in names}


def _uses(chains: Iterable[Chain]) -> Iterator[tuple[str | None, Chain]]:
    """The name of a layer, `None` for a variable, and what follows after its weight; empty for the weight itself."""
    for chain in chains:
        for place, name in enumerate(chain):
            # `self.weight` is a module's own weight.
            if name in _WEIGHTS and place > 0 and chain[:place] != ("self",):
                yield chain[place - 1] if place > 1 else None, chain[place + 1 :]


def _is_read(use: Chain) -> bool:
    """Whether a use of a weight depends on its values."""
    return use[:1] not in _METADATA_USES and not _is_write(use)


def _is_write(use: Chain) -> bool:
    """Whether a use writes: a method such as `mul_`, or an assignment to `data`, which is marked with `=`."""
    return any(name[-1] in "_=" and name[0] != "_" and name != "requires_grad_" for name in use)


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
        if step.opname == "STORE_ATTR" and len(chain) > 1:
            yield (*chain, f"{step.argval}=")
            chain = ()
        if step.argval in _WEIGHTS and step.opname == "LOAD_CONST":
            yield "", step.argval  # of `getattr`
        if len(chain) > 1:
            yield (*chain, "__class__") if before in _ASKING else chain
        before, chain = chain, ()
        if step.opname.startswith(_VARIABLES):  # some instructions load two variables
            name = step.argval if isinstance(step.argval, str) else step.argval[-1]
            chain = ("self" if name == receiver else name,)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _chains_in(inner, receiver)
