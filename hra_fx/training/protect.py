"""Keep the vectors that an optimizer updates orthogonal to the main directions of inputs that must not be forgotten.

If all vectors of a chain are orthogonal to `x`, then `Q x = x`. So the layer computes `W x`, as before training. This
is a property of the vectors alone: files, folded weights and LoRA exports have it too.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hra_fx.compat import copy_all
from hra_fx.errors import AdapterError, ConfigError
from hra_fx.functional import householder
from hra_fx.layers.adapters import get_adapters
from hra_fx.layers.peft_layers import is_of_peft
from hra_fx.layers.sharding import is_dtensor
from hra_fx.model.state import unwrap
from hra_fx.selection.suggestions import some_of
from hra_fx.training.layer_inputs import main_directions
from hra_fx.training.vectors import (
    Vectors,
    averages_parameters,
    layers_with_vectors,
    required_vectors,
    stepped_vectors,
    unwrapped,
    without_directions,
)

#: The entry of a parameter group with the number of directions, and the entry of the optimizer's state with them.
KEY = "hra_protected"
#: Layer -> adapter -> its directions, for reports, also after the optimizer is gone.
_PROTECTED: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()
#: Optimizer -> its protection.
_KNOWN: weakref.WeakKeyDictionary[Optimizer, _Protection] = weakref.WeakKeyDictionary()


def protect(
    optimizer: Any,
    model: nn.Module,
    batches: Iterable[Any] | None,
    directions: int = 16,
    previous: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Keep what the model computes for the main directions of its inputs, while the adapters are trained.

    The model runs `batches`, samples of what it must not forget, in eval mode without adapters. For each adapted layer,
    this gives the `directions` in which most of its inputs lie. From then on, the vectors are orthogonal to these
    directions: they are projected now, and after each step of the optimizer. For these directions `Q x = x` exactly,
    also after saving, folding, or conversion to LoRA. What the model does with other inputs is not protected, and
    neither are biases and modules that are trained in full.

    Call this function after `transform`, before or after `train_pairs`, and before you load a state into the optimizer.
    A second call replaces the directions. Call it again for a copy of the optimizer, and after loading other values
    into the model. A few dozen passages or images are enough. In DDP and FSDP2, each process may pass its own share of
    them.

    For several tasks, one after the other, pass what this function returned as `previous` after a `fold` and a new
    `transform`. Then the samples of earlier tasks are not needed again.

    Args:
        optimizer: a `torch.optim.Optimizer`, or accelerate's wrapper of one. Its `state_dict` contains the directions.
        model: a transformed model, or a model with PEFT's HRA layers; wrapped or not.
        batches: an iterable of batches, such as a DataLoader. A batch is what the model takes: a mapping of keyword
            arguments, a tuple or list of positional arguments, or a tensor. None protects only `previous`.
        directions: the number of new directions in each layer. With those of `previous`, at most half of the width of
            its inputs.
        previous: what a call returned for the same layers of this model, adapted by hra_fx or by PEFT. Its directions
            are protected too, and the new ones are orthogonal to them.

    Returns:
        Copies of the protected directions by the path of the layer in the base model: orthonormal or zero columns
        `(d, k)`, or `(experts, d, k)`, with the dtype of the vectors, and `k = 0` for layers that no batch reached.

    Raises:
        ConfigError: `directions` is not a positive int, or more than half of the width of a layer.
        AdapterError: `batches` is empty, or None without `previous`; `previous` does not fit the layers; inputs are not
            finite; `model` is a part of a transformed model; the optimizer does not update any vectors of the model, or
            16-bit or flat ones (FSDP1, DeepSpeed ZeRO); adapters are merged or scaled; it averages the parameters
            outside of its step; or it protects another model with the same paths. Loading a state that was saved
            without protected directions raises the same error.

    Warns:
        HRAWarning: no batch reached some layers, or other modules read their weights in a way that is not recognized.

    Example:
        >>> from hra_fx.config import HRAConfig
        >>> from hra_fx.api.transform import transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
        >>> keep = torch.randn(8, 6) * torch.tensor([9.0, 9.0, 0.1, 0.1, 0.1, 0.1])
        >>> kept = protect(optimizer, model, [keep], directions=2)
        >>> model(torch.ones(1, 6)).sum().backward()
        >>> optimizer.step()
    """
    optimizer = unwrapped(optimizer)
    inner: Any = unwrap(model)
    # Without PEFT's prefix of names, so that directions fit a model of PEFT and one of hra_fx.
    has_prefix = is_of_peft(inner) and hasattr(inner, "get_base_model")
    layers = layers_with_vectors(inner.get_base_model() if has_prefix else inner)
    stepped = required_vectors(layers, optimizer, model, "protect")
    _check(stepped, optimizer)
    known = _KNOWN[optimizer].layers if optimizer in _KNOWN else {}
    if twice := sorted(path for layer, path in known.items() if layer not in layers and path in layers.values()):
        raise AdapterError(
            f"the optimizer already protects other layers with these paths: {some_of(twice)}. Its state has one entry "
            "for each path, so use an optimizer for each model."
        )
    earlier = _earlier(previous, layers)
    if batches is None and previous is None:
        raise AdapterError("`batches` is None. Pass what the model takes, for example a DataLoader, or `previous`.")
    found = main_directions("protect", inner, stepped, batches, directions, earlier)
    bases = {layer: found.get(layer, torch.zeros(*_shape(layer), 0, dtype=_vectors(layer).dtype)) for layer in layers}
    _check_ranks(stepped, bases)
    protection = _KNOWN.get(optimizer) or _install(optimizer, directions)
    protection.layers.update(layers)
    protection.bases.update(bases)
    protection.start()
    return protection.directions(layers)


def is_protecting(optimizer: Any) -> bool:
    """Whether `protect` was called for an optimizer."""
    return unwrapped(optimizer) in _KNOWN


def directions_of(optimizer: Any) -> dict[str, Tensor]:
    """What `protect` returned for an optimizer, or the directions of a state that was loaded since."""
    if not is_protecting(optimizer):
        raise AdapterError("the optimizer does not protect any directions. Call protect first, or train with it.")
    protection = _KNOWN[unwrapped(optimizer)]
    return protection.directions(protection.layers)


def project_last(optimizer: Optimizer) -> None:
    """Project after the hooks that other functions have registered since `protect`."""
    if protection := _KNOWN.get(optimizer):
        protection.hook.remove()
        protection.hook = optimizer.register_step_post_hook(protection.project)


def refuse_protected_states(optimizer: Optimizer) -> None:
    """Make an optimizer without protection raise an `AdapterError` when it loads a state with protected directions."""

    def check(_: Any, state_dict: dict[str, Any]) -> None:
        if not is_protecting(optimizer) and any(KEY in group for group in state_dict["param_groups"]):
            raise AdapterError(
                "the state was saved with protected directions. Pass protect= with what must be kept, or "
                "previously_protected=, as in the saved run, or start without the state."
            )

    optimizer.register_load_state_dict_pre_hook(check)


def protected_directions(layer: nn.Module, adapter: str) -> Tensor | None:
    """The directions that `protect` keeps in this process for an adapter of a layer, `(d, k)`; `None` without them."""
    return _PROTECTED.get(layer, {}).get(adapter)


def _earlier(previous: Mapping[str, Tensor] | None, layers: Mapping[Any, str]) -> dict[nn.Module, Tensor]:
    """Layer -> its directions in `previous`, on the device of its vectors, without zero columns.

    Zero columns would use up a part of the width.
    """
    if previous is None:
        return {}
    if not isinstance(previous, Mapping):
        raise AdapterError(f"`previous` must be what protect returned, a dictionary, got {type(previous).__name__}.")
    if unfit := _unfit(previous, layers):
        raise AdapterError(
            "`previous` must be what protect returned for the same layers. These are only in `previous`, only in the "
            f"model, or have another width: {unfit}."
        )
    for path, basis in previous.items():
        inner = (basis.double().mT @ basis.double()).cpu()
        if not basis.is_floating_point() or not torch.allclose(inner @ inner, inner, atol=1e-5):
            raise AdapterError(
                f"{path}: the columns in `previous` must be orthonormal and floating-point, but these "
                f"{str(basis.dtype).removeprefix('torch.')} columns are not. Pass what protect returned, in its dtype."
            )
    # Layers with the same input share one tensor.
    made = {id(basis): basis[..., basis.flatten(0, -2).any(dim=0)] for basis in previous.values()}
    return {layer: made[id(previous[path])].to(_vectors(layer).detach()) for layer, path in layers.items()}


def _unfit(bases: Mapping[str, Any], layers: Mapping[Any, str]) -> str:
    """Names whose directions do not fit a layer, and of layers without directions; empty if all fit."""
    given = {path: tuple(getattr(basis, "shape", ())[:-1]) for path, basis in bases.items()}
    wanted = {path: _shape(layer) for layer, path in layers.items()}
    return some_of(sorted({path for path, _ in given.items() ^ wanted.items()}))


def _vectors(layer: Any) -> Tensor:
    """The vectors of any adapter of a layer."""
    vectors: Tensor = next(iter(layer.hra_u.values()))
    return vectors


def _shape(layer: Any) -> tuple[int, ...]:
    """`(d,)` or `(experts, d)`."""
    return tuple(_vectors(layer).shape[:-1])


def _check_ranks(found: list[Vectors], bases: Mapping[nn.Module, Tensor]) -> None:
    for one in found:
        count = bases[one.layer].shape[-1]
        if one.apply_GS and one.r + count >= one.tensor.shape[-2]:
            raise ConfigError(
                f"{one.path}: with Gram-Schmidt, `r` + `directions` must be less than the width, got {one.r} + "
                f"{count} for width {one.tensor.shape[-2]}. Pass fewer directions, or exclude the layer."
            )


def _check(found: list[Vectors], optimizer: Optimizer) -> None:
    if averages_parameters(optimizer):
        raise AdapterError(
            f"protect: {type(optimizer).__name__} averages the parameters outside of its step, so the averages would "
            "not be orthogonal to the directions. Use another optimizer."
        )
    for one in found:
        if one.is_flat:
            raise AdapterError(
                f"{one.path} is part of a flat parameter (FSDP1, DeepSpeed ZeRO), so it cannot be projected. Use DDP "
                "or FSDP2."
            )
        if one.tensor.dtype.itemsize < 4:
            raise AdapterError(
                f"{one.path} is {str(one.tensor.dtype).removeprefix('torch.')}, so rounding moves it out of the "
                "orthogonal complement. Train the vectors in float32: parameter.data = parameter.data.float()."
            )
        _check_layer(one)


def _check_layer(one: Vectors) -> None:
    """Raise an error if the adapters of the layer are merged or scaled: then `Q` is not the chain of the vectors."""
    adapters, name = get_adapters(one.layer), one.path.rpartition(".")[2]
    merged = getattr(one.layer, "merged", False) if adapters is None else adapters.unmerged is not None
    if merged:
        raise AdapterError(f"{one.path} is merged into the weight. Unmerge the adapters first.")
    if adapters is not None and name in adapters.scales:
        raise AdapterError(f"{one.path} has a scale. Call hra_fx.set_scale(model, {name!r}, 1.0) first.")


class _Protection:
    """Projects the vectors that one optimizer updates.

    Attributes:
        layers: layer of a model that `protect` was called for (a weak reference) -> its path.
        bases: layer -> its directions `(d, k)` or `(experts, d, k)`, with `k = 0` if no batch reached it.
        stacked: the directions of the vectors of a batch, by the ids of the layers.
        hook: the handle of the hook after each step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer: Any = weakref.ref(optimizer)
        self.layers: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.bases: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()
        self.stacked: dict[Any, Tensor] = {}
        self.hook: Any = None

    def directions(self, layers: Mapping[nn.Module, str]) -> dict[str, Tensor]:
        """Path -> a copy of the directions, which layers with the same input share."""
        return copy.deepcopy({path: self.bases[layer] for layer, path in layers.items()})

    @torch.no_grad()
    def start(self) -> None:
        """Project the vectors and their anchors. An adapter that was the identity still is."""
        self.stacked.clear()
        for layer, path, tensor, _, apply_GS in stepped_vectors(self.layers, self.optimizer()):
            _PROTECTED.setdefault(layer, {})[path.rpartition(".")[2]] = self.bases[layer]
            has_directions = self.bases[layer].shape[-1] > 0
            anchor = _anchor(layer, path) if has_directions and apply_GS and not is_dtensor(tensor) else None
            # If the adapter is still the identity, its anchor is made from the projected vectors, so it stays that.
            if anchor is not None and torch.allclose(anchor, householder.orthonormalize(tensor)):
                anchor.copy_(householder.orthonormalize(without_directions(tensor, self.bases[layer])))
        self.project()

    @torch.no_grad()
    def project(self, *_: Any) -> None:
        """Project the vectors that the optimizer updates, and their anchors, which a state may have replaced."""
        alike: dict[Any, list[Vectors]] = defaultdict(list)
        for one in stepped_vectors(self.layers, self.optimizer()):
            if not self.bases[one.layer].shape[-1]:
                continue
            if (anchor := _anchor(one.layer, one.path)) is not None:
                anchor.copy_(without_directions(anchor, self.bases[one.layer]))
            if is_dtensor(one.tensor):
                one.tensor.copy_(without_directions(one.tensor, self.bases[one.layer]))
            else:
                basis = self.bases[one.layer]
                alike[one.tensor.shape, basis.shape, one.tensor.dtype, one.tensor.device].append(one)
        for group in alike.values():
            like = group[0].tensor
            key = (like.device, like.dtype, *(id(one.layer) for one in group))
            if key not in self.stacked:
                self.stacked[key] = torch.stack([self.bases[one.layer].to(like) for one in group])
            basis, values = self.stacked[key], [one.tensor for one in group]
            stacked = torch.stack(values)
            copy_all(values, list((stacked - basis @ (basis.mT @ stacked)).unbind()))

    def save(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Add the directions to a state, by the paths of layers."""
        return {**state, KEY: {path: self.bases[layer] for layer, path in self.layers.items()}}

    def load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Use the directions of a state. Some tools keep only the parameter groups; then the present ones remain."""
        if not all(KEY in group for group in state["param_groups"]):
            raise AdapterError(
                "the optimizer protects directions, but the state was saved without protection. Leave protect out, or "
                "start without the state."
            )
        if saved := state.get(KEY):
            if unfit := _unfit(saved, self.layers):
                raise AdapterError(
                    "the state and the model do not have protected directions for the same layers. These are only in "
                    f"one of both, or have another width: {unfit}. Call protect with the model as it was when the "
                    "state was saved, with or without a wrapper, or start without the state."
                )
            self.bases.update({layer: saved[path].to(_vectors(layer).device) for layer, path in self.layers.items()})
        self.start()


def _install(optimizer: Optimizer, directions: int) -> _Protection:
    protection = _KNOWN[optimizer] = _Protection(optimizer)
    optimizer.defaults[KEY] = directions  # for groups that are added later
    for group in optimizer.param_groups:
        group[KEY] = directions
    protection.hook = optimizer.register_step_post_hook(protection.project)
    optimizer.register_state_dict_post_hook(protection.save)
    optimizer.register_load_state_dict_pre_hook(protection.load)
    return protection


def _anchor(layer: nn.Module, path: str) -> Tensor | None:
    """The anchor of the vectors with this path."""
    adapters = get_adapters(layer)
    return None if adapters is None else adapters.anchor(path.rpartition(".")[2])
