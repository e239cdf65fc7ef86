"""The carrier of a whole model: a state is loaded rightly, whosever trained copies were in place when it was taken.

A copy that is in place has the name of the tensor whose place it is in, so the names in a `state_dict` follow from what
was active. A state of another moment is renamed before it is loaded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.kernels.prefetch import ahead
from hra_fx.layers.adapters import ANCHOR
from hra_fx.layers.class_swap import Carrier
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import BASE, held_by
from hra_fx.model.state import record_of, sites_of


class RootCarrier(Carrier):
    """A model that was transformed."""

    _hra_height = 2

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """`base.forward`, with what all layers need of their vectors made at its start."""

        @functools.wraps(base.forward)
        def forward(self: RootCarrier, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # first, for a compiler guards on whatever is asked before
                return base.forward(self, *args, **kwargs)
            record = record_of(self)
            if record is None or record.disabled or not record.active or getattr(self, "_is_replica", False):
                return base.forward(self, *args, **kwargs)
            with ahead(self):
                return base.forward(self, *args, **kwargs)

        return {"forward": forward}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called first of all, before any module below: so names can still be changed."""
        self._refuse_across_a_merge(state_dict, prefix, rest[-1])
        parts = (key.rpartition(f".{REFLECTION}.") for key in state_dict if key.startswith(prefix))
        theirs = {name.removesuffix(ANCHOR) for path, _, name in parts if path}
        # By every path of a shared module, for a state has it as often.
        for path, owner in self.named_modules(remove_duplicate=False):
            copies = held_by(owner)
            if copies is None:
                continue
            place = f"{prefix}{path}." if path else prefix
            for name, ours in copies.in_place.items():
                owners = [adapter for adapter, names in copies.copied.items() if name in names]
                waiting = {owner: f"{place}{SAVED}.{owner}.{name}" for owner in (BASE, *owners)}
                _rename(state_dict, f"{place}{name}", waiting, ours, theirs)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _refuse_across_a_merge(self, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Merged weights in an unmerged model would be rotated twice, and the other way round not at all."""
        given = [key for key in state if key.startswith(prefix)]
        there = any(key.endswith(f".{REFLECTION}.unmerged") for key in given)
        here = any(layer.hra_u.unmerged is not None for layer in sites_of(self).values())
        if not given or there is here:
            return
        side = "state and not in the model" if there else "model and not in the state"
        way_out = "Merge or unmerge them first (hra_fx.merge_adapter, hra_fx.unmerge_adapter)."
        errors.append(f"{prefix}: adapters are merged in the {side}. {way_out}")
        # What is there already, so that nothing is changed by a load that is going to fail.
        state.update({f"{prefix}{key}": own for key, own in self.state_dict().items() if f"{prefix}{key}" in state})


def _rename(state: dict[str, Any], in_place: str, waiting: dict[str, str], ours: str, theirs: set[str]) -> None:
    """Give the copies of one tensor in a state the names that they have in the model.

    Args:
        state: the state.
        in_place: the tensor's own name.
        waiting: adapter or `BASE` -> the name of its copy while it waits.
        ours: whose copy is in place in the model.
        theirs: the adapters of the state.
    """
    values: dict[str, Tensor] = {owner: state.pop(key) for owner, key in waiting.items() if key in state}
    if in_place in state:
        # In place was the one that did not wait: an adapter of the state, else the base model.
        owner = next((owner for owner in waiting if owner in theirs and owner not in values), BASE)
        if owner in values:  # that of an adapter which the model does not have, and which is to be reported as such
            state[waiting[BASE].replace(f".{BASE}.", ".of_another_adapter.")] = state.pop(in_place)
        else:
            values[owner] = state.pop(in_place)
    state.update({in_place if owner == ours else waiting[owner]: value for owner, value in values.items()})
