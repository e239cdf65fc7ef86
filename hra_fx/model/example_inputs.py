"""Example inputs: what a user gives for one call of a model."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hra_fx.compat import pytree
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


@contextmanager
def random_kept() -> Iterator[None]:
    """Put the random numbers of torch, Python and numpy back after the block, which a forward may draw from."""
    numpy = sys.modules.get("numpy")  # what is not loaded, no forward uses
    states = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])


def seed_all(seed: int) -> None:
    """Seed torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
