"""The names of adapters, and of their buffers."""

from __future__ import annotations

from torch import nn

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
