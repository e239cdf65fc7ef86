"""Checks that the containers of vectors and of trained copies share: adapter names, and tensors without values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError

#: Suffixes of the names of an adapter's buffers: the directions that it keeps, and its scaled chain.
KEPT = "_kept"
SCALED = "_scaled"
#: Names that mean the base model, for hra_fx and for PEFT.
_OF_BASE = ("base_layer", "original_module")


def check_adapter_name(name: object, container: nn.Module | None = None) -> None:
    """Raise an error if a name cannot be the name of a folder, and of a parameter or module in a container."""
    if (
        not isinstance(name, str)
        or not name.strip()
        or name != name.strip()
        or any(sign in name for sign in "./\\\0")
        or name.endswith((KEPT, SCALED))
        or hasattr(nn.ParameterDict, name)
        or hasattr(container, name)
        or name in _OF_BASE
    ):
        raise AdapterError(
            f"`adapter_name` must be a string that can name a parameter and a folder: no dots, slashes or backslashes, "
            f"no spaces at its ends, not ending in {KEPT!r} or {SCALED!r}, and not a reserved name; got "
            f"{name!r}."
        )


class FilledLater(nn.Module):
    """A module whose tensors are NaN after they leave the meta device, until they are filled.

    Otherwise, an adapter could train from the uninitialized memory that `to_empty` allocates.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name for name, tensor in self._tensors() if tensor.is_meta}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self._tensors():
            if name in before and not tensor.is_meta and tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)
        return self

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.named_parameters(), *self.named_buffers()]
