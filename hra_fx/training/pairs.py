"""`train_pairs` of 0.4, which adapters now do by themselves, and the states of optimizers that 0.4 has written."""

from __future__ import annotations

import warnings
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.functional.pairs import DIFFERENCE

#: The entry of a parameter group in which 0.4 stores `difference`, if it trains pairs.
_KEY = "hra_pair_difference"


def train_pairs(optimizer: Any = None, *args: object, **kwargs: object) -> None:
    """Do nothing: adapters train in pairs by themselves (`HRAConfig(pairs=True)`). Scripts of 0.4 call this function.

    If the optimizer then loads a state that 0.4 wrote, the state continues where 0.4 stopped, if 0.4 trained pairs with
    the default `difference`; otherwise, loading it raises an `AdapterError`.

    Warns:
        HRAWarning: always, so Python shows it once for each line of a program.
    """
    text = "train_pairs does nothing since 0.5: adapters train in pairs by themselves. Remove the call."
    warnings.warn(text, HRAWarning, stacklevel=2)
    if isinstance(optimizer, Optimizer):
        optimizer.register_load_state_dict_pre_hook(_with_shapes_of_pairs)


def _with_shapes_of_pairs(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A state whose moments of pairs, `(d, r)` in 0.4, have the shape `(d, r / 2, 2)`, in the same order."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    places = ((index, group.get(_KEY)) for group in saved["param_groups"] for index in group["params"])
    state = dict(saved["state"])
    for parameter, (index, difference) in zip(parameters, places, strict=False):
        for name, value in state.get(index, {}).items():
            if not isinstance(value, Tensor) or value.dim() < 2 or value.numel() != parameter.numel():
                continue
            if value.shape != parameter.shape and difference != DIFFERENCE:
                how = "without pairs" if difference is None else f"with difference={difference}"
                raise AdapterError(
                    f"the state was saved by hra_fx 0.4 {how}, so {name} of shape {tuple(value.shape)} does not fit a "
                    f"parameter of shape {tuple(parameter.shape)}. Start without the state; or continue with vectors: "
                    "HRAConfig(..., pairs=False)."
                )
            state[index] = state[index] | {name: value.reshape(parameter.shape)}
    return saved | {"state": state}
