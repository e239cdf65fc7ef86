"""Example inputs: what a user gives for one call of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

from hra_fx.errors import AdapterError

#: Positional and keyword arguments of one call.
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(example_inputs: Any) -> Call:
    """Example inputs as positional and keyword arguments.

    Args:
        example_inputs: one tensor, a tuple or list of positional arguments, or a mapping of keyword arguments (as a
            tokenizer of transformers gives it).

    Raises:
        AdapterError: it is none of these.

    Example:
        >>> import torch
        >>> as_call({"input_ids": torch.ones(1, 2)})
        ((), {'input_ids': tensor([[1., 1.]])})
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise AdapterError(
        f"example_inputs: a {type(example_inputs).__name__}. Give a tensor, a tuple of positional arguments, or a "
        "dictionary of keyword arguments."
    )


def fresh(call: Call) -> Call:
    """A call with tensors of its own, for a forward may write into them; other objects (a cache) are copied too."""

    def own(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)

    made: Call = pytree.tree_map(own, call)
    return made
