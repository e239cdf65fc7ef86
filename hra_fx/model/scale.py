"""`set_scale`: the scale of an adapter, along the geodesic from the identity to its rotation."""

from __future__ import annotations

import math
import warnings

from torch import Tensor, nn

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.layers.sharding import reshard
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.offload import load_vectors
from hra_fx.model.state import adapted_layers, names_in, root_of


def set_scale(model: nn.Module, adapter_name: str, alpha: float) -> None:
    """Set the scale of an adapter: `Q` becomes `exp(alpha log Q)`, which is orthogonal for every `alpha`.

    At 0 the adapter is the identity, and at 1 it has its full effect. In between, every rotation angle is multiplied by
    `alpha`. (PEFT ignores a scale, with a warning.) An adapter can only be trained at scale 1, and the scale is not
    saved. Trained copies (`modules_to_save`, `bias`) are not affected.

    Args:
        model: a transformed model.
        adapter_name: the adapter, active or not.
        alpha: the scale, from 0 to 1.

    Raises:
        AdapterError: the model has no such adapter, the adapter is merged, `alpha` is out of range, or the `Q` of a
            layer is not a rotation: with an odd number of reflections, there is no path of rotations from the identity
            to `Q`. The model is unchanged.

    Warns:
        HRAWarning: the adapter has trained copies.

    Example:
        >>> from hra_fx import HRAConfig, report, transform
        >>> config = HRAConfig(r=2, init_weights=False, target_modules=["0"])
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), config)
        >>> whole = report(model).rows[0].angle
        >>> set_scale(model, "default", 0.5)
        >>> abs(report(model).rows[0].angle - whole / 2) < 1e-5
        True
    """
    root, state = root_of(model)
    (name,) = names_in(state, adapter_name)
    check_scale(alpha)
    if name in state.merged:
        raise AdapterError(f"adapter {name!r} is merged into the weights. Call unmerge_adapter first.")
    load_vectors(root)
    reshard(model.modules())
    layers = {path: layer.hra_u for path, layer in adapted_layers(root).items() if name in layer.hra_u}
    chains: dict[str, Tensor] = {}
    for path, reflection in layers.items() if alpha != 1 else ():
        try:
            chains[path] = reflection.scaled(name, float(alpha))
        except AdapterError as error:
            raise AdapterError(f"{path}: adapter {name!r}: {error}") from error
    for path, reflection in layers.items():
        reflection.scale(name, float(alpha), chains.get(path))
    if alpha != 1 and any(name in copies.copied for _, copies in all_copies(root).values()):
        text = f"adapter {name!r}: the scale only affects reflections, not trained modules and biases."
        warnings.warn(text, HRAWarning, stacklevel=2)


def check_scale(alpha: object) -> None:
    """Check that a scale is a number from 0 to 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (math.isfinite(alpha) and 0 <= alpha <= 1):
        raise AdapterError(f"`alpha` must be a number from 0 (base model) to 1 (full adapter), got {alpha!r}.")
