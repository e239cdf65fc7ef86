"""Names of adapters, and of the buffers that belong to an adapter."""

from __future__ import annotations

from torch import nn

from hra_fx.errors import AdapterError

#: The suffix of the name of an adapter's anchor.
ANCHOR = "_anchor"
SCALED = "_scaled"
#: Attributes of the containers of vectors and of trained copies, and the names that mean the base model.
_RESERVED = (
    *("kind", "fan_in_fan_out", "weight_name", "reflects_input", "width", "specs", "active", "scales", "unmerged"),
    *("trainable_at_full_scale", "acts", "inactive", "base_layer", "original_module", "would_change"),
    *("copied", "in_place", "make", "tensors", "activate_copies", "promote_to_base", "remove", "set_trainable"),
)


def check_adapter_name(name: object) -> None:
    """Check that a name can be the name of both a parameter and a folder.

    Raises:
        AdapterError: the name cannot be used.

    Example:
        >>> check_adapter_name("style-2")
    """
    if (
        not isinstance(name, str)
        or not name.strip()
        or name != name.strip()
        or any(sign in name for sign in "./\\\0")
        or name.endswith((ANCHOR, SCALED))
        or hasattr(nn.ParameterDict, name)
        or name in _RESERVED
    ):
        raise AdapterError(
            f"`adapter_name` must be a string that can name a parameter and a folder: no dots, slashes or backslashes, "
            f"no spaces at its ends, not ending in {ANCHOR!r} or {SCALED!r}, and not a reserved name; got {name!r}."
        )
