"""Process state that a graph does not record: grad mode, autocast, saved-tensor hooks and random generators."""

from __future__ import annotations

import random

import torch

from hra_fx import compat


class GraphState:
    """The state in which a trace started; a forward that changes it cannot be a graph."""

    def __init__(self) -> None:
        """Remember the state of this thread."""
        self._grad = torch.is_grad_enabled()
        self._autocast = _autocast()
        self._hooks = compat.has_saved_tensors_hooks()
        self._random = (torch.get_rng_state(), random.getstate())

    def why_not(self) -> str | None:
        """Why no node can be made now, if none can."""
        if torch.is_grad_enabled() != self._grad:
            # A custom autograd function runs its forward without gradients too.
            return "it changes grad mode or calls a custom autograd function, which a graph drops"
        if _autocast() != self._autocast:
            return "it runs under its own autocast, which a graph drops"
        if compat.has_saved_tensors_hooks() != self._hooks:
            return "it checkpoints activations or changes what is saved for backward, which a graph drops"
        return None

    def why_not_random(self) -> str | None:
        """Why the trace is not valid, if it drew or seeded random numbers, which the graph has as constants."""
        torch_state, python_state = self._random
        if torch.equal(torch_state, torch.get_rng_state()) and python_state == random.getstate():
            return None
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        return "it draws random numbers that would become constants"


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
