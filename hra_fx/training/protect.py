"""Keep what a model computes for the main directions of some inputs.

If all vectors of a chain are orthogonal to `x`, then `Q x = x`, and the layer computes `W x` as before training. An
adapter computes its vectors without their part along the directions that it keeps, so an optimizer may do what it
likes. Files, folded weights and LoRA exports have these vectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.config_fields import check_positive_int
from hra_fx.errors import AdapterError, ConfigError, HRAWarning
from hra_fx.functional.directions import Sketch
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.model.state import AdapterState, adapted_layers, check_unmerged, root_of, unwrap
from hra_fx.model.whole import check_whole
from hra_fx.selection.suggestions import some_of
from hra_fx.training.inputs import sketches_of
from hra_fx.training.own_texts import own_texts
from hra_fx.training.samples import calls_of


@dataclass(frozen=True, repr=False)
class Protection:
    """What `hra_fx.protect` keeps. Printing it shows a summary.

    Attributes:
        directions: path of a layer -> a copy of its directions: orthonormal or zero columns, `(d, k)`, or
            `(experts, d, k)`. Save them with `torch.save`.
        shares: path of a layer -> the share of the sum of squares of its inputs that its directions hold, from 0 to 1.
    """

    directions: dict[str, Tensor]
    shares: dict[str, float]

    def __repr__(self) -> str:
        """Return the number of directions and of layers, and the smallest shares."""
        count, most = len(self.directions), max((basis.shape[-1] for basis in self.directions.values()), default=0)
        lines = [f"{count} protected layer{'s' * (count != 1)}, with up to {most} directions each"]
        if self.shares:
            mean = sum(self.shares.values()) / len(self.shares)
            lowest = sorted(self.shares, key=lambda path: self.shares[path])[:3]
            least = ", ".join(f"{self.shares[path]:.1%} in {path}" for path in lowest)
            lines.append(f"they hold {mean:.1%} of the inputs on average; least: {least}")
        return "\n".join(lines)


@torch.inference_mode(False)
def protect(
    model: nn.Module,
    samples: Any = None,
    directions: int = 16,
    previous: Protection | Mapping[str, Tensor] | None = None,
    *,
    tokenizer: Any = None,
) -> Protection:
    """Keep what the model computes for the main directions of its inputs, while its adapters are trained.

    The model runs `samples`, examples of what it must not forget, in eval mode without adapters. For each adapted
    layer, this gives the `directions` in which most of its inputs lie. From then on, `Q x = x` on their span at every
    moment, whatever the optimizer, weight decay or averaging does: to about 1e-6 of the length of `x` with float32
    vectors, and to 4e-3 if the layer computes in bfloat16. This also holds after saving, folding, or conversion to
    LoRA. What the model does with other inputs is not protected, and neither are biases and modules that are trained in
    full.

    Call this function at any time after `transform`, before or during training. It applies to the active adapters, not
    to those that are added later. A second call replaces the directions. The `state_dict` contains them, and a model
    that loads it is protected. A few dozen texts or images are enough. In DDP and FSDP2, each process may pass its own
    samples.

    For several tasks, one after the other, pass what this function returned as `previous` after a `fold` and a new
    `transform`. Then the samples of earlier tasks are not needed again.

    Args:
        model: a transformed model, wrapped or not. For a model of PEFT, call `hra_fx.from_peft` first.
        samples: an iterable of batches, such as a DataLoader; of rows of a tokenized dataset; or of texts. A batch is
            what the model takes: a mapping of keyword arguments, a tuple or list of positional arguments, or a tensor.
            Padding that an `attention_mask` in a mapping hides is left out. None: texts that the model writes itself
            (`hra_fx.own_texts`).
        directions: the number of new directions in each layer. With those of `previous`, at most half of the width of
            its inputs.
        previous: what a call returned for layers of this model, or its `directions`. They are protected too, and the
            new ones are orthogonal to them.
        tokenizer: the model's tokenizer, for texts.

    Returns:
        The directions of the layers that the samples reached, and of those in `previous`.

    Raises:
        ConfigError: `directions` is not a positive int, or more than half of the width of a layer.
        AdapterError: the model has no adapters of hra_fx, or is a part of a transformed model; an active adapter is
            frozen, merged or scaled; `samples` is empty or of another kind; inputs are not finite; padding cannot be
            left out; or `previous` does not fit. The model is unchanged.

    Warns:
        HRAWarning: some layers are not protected, because no sample reached them, or because the model also uses their
            weights in a way that is not known, such as transposed.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> protect(model, [torch.tensor([[3.0, 4.0, 0.0, 0.0, 0.0, 0.0]])], directions=2)
        1 protected layer, with up to 2 directions each
        they hold 100.0% of the inputs on average; least: 100.0% in 0
    """
    state, layers = _adapters(model, trained=True)
    earlier = _earlier(previous, layers)
    _check_directions(directions, layers, state, earlier)
    if samples is None:
        samples = own_texts(model, tokenizer=tokenizer)
    most = directions + max((basis.shape[-1] for basis in earlier.values()), default=0)
    inner = unwrap(model)
    found = sketches_of(inner, layers, calls_of(inner, samples, tokenizer), most)
    if bad := next((path for path, sketch in found.items() if not sketch.energy.isfinite()), None):
        raise AdapterError(f"{bad}: its inputs contain NaN or infinite values, so they have no main directions.")
    if unseen := [path for path in layers if path not in found]:
        text = (
            "protect: `samples` do not protect these layers, because no sample reached them, or because the model also "
            f"uses their weights in a way that is not known, such as transposed: {some_of(unseen)}."
        )
        warnings.warn(text, HRAWarning, stacklevel=3)  # of the caller: there is a decorator
    new = {path: sketch.basis(directions, earlier.get(path)) for path, sketch in found.items()}
    return _keep(layers, state, {**earlier, **new}, found)


def unprotect(model: nn.Module) -> None:
    """Stop keeping directions in the active adapters (`hra_fx.protect`). What they compute now does not change.

    Args:
        model: a transformed model.

    Raises:
        AdapterError: the model has no adapters of hra_fx, or an active adapter is merged or scaled.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> kept = protect(model, [torch.randn(8, 6)], directions=2)
        >>> unprotect(model)
        >>> model[0].hra_u.kept("default") is None
        True
    """
    state, layers = _adapters(model, trained=False)
    for layer in layers.values():
        for name in _active(layer, state):
            layer.hra_u.keep(name, None)


def _active(layer: AdaptedLayer, state: AdapterState) -> list[str]:
    return [name for name in state.active if name in layer.hra_u]


def _adapters(model: nn.Module, *, trained: bool) -> tuple[AdapterState, dict[str, AdaptedLayer]]:
    """The state of a model and its layers with active adapters, neither merged nor scaled, and perhaps `trained`."""
    root, state = root_of(model)
    check_unmerged(state)
    layers = {path: layer for path, layer in adapted_layers(root).items() if _active(layer, state)}
    if not layers:
        raise AdapterError("the model has no active adapter to protect. Call hra_fx.set_adapter(model, name) first.")
    for path, layer in layers.items():
        for name in _active(layer, state):
            place = f"{path}: adapter {name!r}"
            if name in layer.hra_u.scales:
                raise AdapterError(f"{place} has a scale. Call hra_fx.set_scale(model, {name!r}, 1.0) first.")
            if trained and not layer.hra_u[name].requires_grad:
                raise AdapterError(
                    f"{place} is frozen, and protecting it would change what it has learned. Call "
                    f"hra_fx.set_adapter(model, {name!r}) to train it, or activate only adapters that you train."
                )
    check_whole(root, "protect it", "weights")
    return state, layers


def _check_directions(
    directions: Any, layers: Mapping[str, AdaptedLayer], state: AdapterState, earlier: Mapping[str, Tensor]
) -> None:
    check_positive_int("directions", directions)
    for path, layer in layers.items():
        total, width = directions + (earlier[path].shape[-1] if path in earlier else 0), layer.hra_u.width
        if 2 * total > width:
            raise ConfigError(
                f"`directions` must be at most half of the width of each layer, got {total} for {path} of width "
                f"{width}. Pass fewer directions (those of `previous` count too), or exclude the layer."
            )
        for spec in (layer.hra_u.specs[name] for name in _active(layer, state)):
            if spec.apply_GS and spec.r + total >= width:
                raise ConfigError(
                    f"{path}: with Gram-Schmidt, `r` + `directions` must be less than the width, got {spec.r} + "
                    f"{total} for width {width}. Pass fewer directions, or exclude the layer."
                )


def _earlier(previous: Any, layers: Mapping[str, AdaptedLayer]) -> dict[str, Tensor]:
    """Path -> its directions in `previous`, without zero columns, which would use up a part of the width."""
    bases: Any = getattr(previous, "directions", {} if previous is None else previous)
    if not isinstance(bases, Mapping):
        raise AdapterError(f"`previous` must be what protect returned, got {type(previous).__name__}.")
    wanted = {path: layer.hra_u.vectors_shape(1)[:-1] for path, layer in layers.items()}
    if unfit := sorted(path for path, basis in bases.items() if wanted.get(path) != getattr(basis, "shape", ())[:-1]):
        raise AdapterError(
            "`previous` must be what protect returned for the same layers. The model has no adapted layers of this "
            f"width at these paths: {some_of(unfit)}."
        )
    for path, basis in bases.items():
        inner = basis.cpu().double().mT @ basis.cpu().double()
        if not basis.is_floating_point() or not torch.allclose(inner @ inner, inner, atol=1e-5):
            raise AdapterError(
                f"{path}: the columns in `previous` must be orthonormal and floating-point, but these "
                f"{str(basis.dtype).removeprefix('torch.')} columns are not. Pass what protect returned, in its dtype."
            )
    return {path: basis[..., basis.flatten(0, -2).any(dim=0)] for path, basis in bases.items()}


def _keep(
    layers: Mapping[str, AdaptedLayer], state: AdapterState, bases: Mapping[str, Tensor], found: Mapping[str, Sketch]
) -> Protection:
    """Make the active adapters keep these directions, and no others."""
    protection = Protection({}, {})
    for path, layer in layers.items():
        share = found[path].share(bases[path]) if path in found else None
        for name in _active(layer, state):
            layer.hra_u.keep(name, bases.get(path), share)
            if (kept := layer.hra_u.kept(name)) is not None:
                protection.directions[path] = kept.clone()
        if share is not None:
            protection.shares[path] = share
    return protection
