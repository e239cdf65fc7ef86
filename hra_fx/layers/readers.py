"""Which modules read weights of their layers instead of calling the layers: those whose code names `weight`.

    F.linear(x, self.qkv.weight)      in a forward: the weight must be W Q

This also finds modules that only name a weight of their own or ask for its dtype, which does no harm: they are marked
(`hra_fx.layers.weight`), and read the same values as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

_WEIGHTS = {"weight", "in_proj_weight"}
#: The ends of names of classes whose code needs the parameters of their layers, not `W Q`: T5 only asks for a dtype,
#: which would compute `W Q` for nothing, and RWKV writes into weights when it changes between train and eval mode.
_NEED_PARAMETERS = ("DenseActDense", "DenseGatedActDense", "RwkvModel")


def reads_weights(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class, or a method that it uses, may use weights of other modules."""
    return any(_WEIGHTS & names for _, names in methods_of_forward(cls))


def needs_parameters(cls: type[nn.Module]) -> bool:
    """Whether the code of a class needs the parameters of its layers."""
    return cls.__module__.startswith("transformers.") and cls.__name__.endswith(_NEED_PARAMETERS)


def writes_data(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class, or a method that it uses, names the `data` of a weight.

    Nothing can find a write to it.
    """
    return any("data" in names and _WEIGHTS & names for _, names in methods_of_forward(cls))


def methods_of_forward(cls: type[nn.Module]) -> list[tuple[str, set[str]]]:
    """The methods and properties that the forward of a class may use, directly or not, with the names in their code."""
    named = list(_named(cls))
    found = {"forward"}
    while new := {used for name, names in named if name in found for used in names} & {n for n, _ in named} - found:
        found |= new
    return [(name, names) for name, names in named if name in found]


def _named(cls: type[nn.Module]) -> Iterator[tuple[str, set[str]]]:
    """Each method and property of a class and its bases below `nn.Module`, with the names that its code uses."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, held in vars(base).items():
            function: Any = getattr(held, "__func__", getattr(held, "fget", getattr(held, "func", held)))
            code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
            if code is not None:
                yield name, _names_in(code)


def _names_in(code: CodeType) -> set[str]:
    names = {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}  # for `getattr`
    return names.union(*[_names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)])
