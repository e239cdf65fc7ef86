"""The carrier of a whole model: a state is loaded rightly, whosever trained copies were in place when it was taken.

A copy that is in place has the name of the tensor whose place it is in, so the names in a `state_dict` follow from what
was active. A state of another moment is renamed before it is loaded.
"""

from __future__ import annotations

from typing import Any

from hra_fx.adapters.copies import BASE, copies_of
from hra_fx.carrier.swap import Carrier
from hra_fx.site import SAVED


class RootCarrier(Carrier):
    """A model that was transformed."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called first of all, before any module below: so names can still be changed."""
        for path, (_, copies) in copies_of(self).items():
            place = f"{prefix}{path}.".lstrip(".")
            for name, ours in copies.in_place.items():
                owners = [BASE, *(adapter for adapter, names in copies.copied.items() if name in names)]
                waiting = {owner: f"{place}{SAVED}.{owner}.{name}" for owner in owners}
                _rename(state_dict, f"{place}{name}", waiting, ours)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _rename(state: dict[str, Any], in_place: str, waiting: dict[str, str], ours: str) -> None:
    """Exchange what is in place in a state for what is in place in the model.

    Args:
        state: the state.
        in_place: the tensor's own name.
        waiting: adapter or `BASE` -> the name of its copy while it waits.
        ours: whose copy is in place in the model.
    """
    if in_place not in state:
        return
    absent = [owner for owner, key in waiting.items() if key not in state]
    # A state of adapters alone leaves out what waits of the base model.
    theirs = next((owner for owner in absent if owner != BASE), BASE)
    if ours in absent or theirs not in absent:
        return
    state[waiting[theirs]] = state.pop(in_place)
    state[in_place] = state.pop(waiting[ours])
