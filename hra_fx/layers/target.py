"""Basic facts about a layer that can be adapted, for passes and the API: its kind, its weight, its names."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from hra_fx.compat import loaded_class
from hra_fx.errors import AdapterError
from hra_fx.layers.experts_weight import CHILD, ExpertsWeight
from hra_fx.layers.quantized.libraries import is_packed, packed_name, quant_scheme_of

LayerKind: TypeAlias = Literal["linear", "conv1d", "conv2d", "conv3d", "attention", "experts"]

#: Name of the child module with the adapters of a layer, which is part of its `state_dict` keys (PEFT's name).
REFLECTION = "hra_u"
#: Name of the child module with trained copies of tensors that are not in use.
SAVED = "hra_saved"
#: Suffixes of the names of an adapter's buffers: the directions that it keeps, and its scaled chain.
KEPT = "_kept"
SCALED = "_scaled"
#: Names that mean the base model, for hra_fx and for PEFT.
_OF_BASE = ("base_layer", "original_module")
#: Names of all children that adapters add to the modules of the base model.
ADAPTER_CHILDREN = frozenset((REFLECTION, SAVED))
#: Name of the child of a graph that computes the factors of all its layers.
FACTORS = "hra_factors"
#: Name of the attribute of an adapted layer that contains its base weight.
BASE_WEIGHT = "hra_base"

_CONVOLUTIONS: dict[type[nn.Module], LayerKind] = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}


def check_adapter_name(name: object, container: nn.Module) -> None:
    """Raise an error if a name cannot be the name of a folder, and of a parameter or module in a container."""
    if (
        not isinstance(name, str)
        or not name
        or name != name.strip()
        or any(sign in name for sign in "./\\\0")
        or name.endswith((KEPT, SCALED))
        or hasattr(container, name)
        or name in _OF_BASE
    ):
        raise AdapterError(
            f"`adapter_name` must be a string that can name a parameter and a folder: no dots, slashes or backslashes, "
            f"no spaces at its ends, not ending in {KEPT!r} or {SCALED!r}, and not a reserved name; got {name!r}."
        )


def find_kind(layer: nn.Module) -> LayerKind | None:
    """The kind of a layer that can be adapted; `None` for any other module."""
    if isinstance(layer, nn.Linear) or is_conv1d(layer) or is_packed(layer):
        return "linear"
    if isinstance(layer, nn.MultiheadAttention):
        return "attention"
    if isinstance(layer, ExpertsWeight):
        return "experts"
    return next((kind for base, kind in _CONVOLUTIONS.items() if isinstance(layer, base)), None)


def kind_of(layer: nn.Module) -> LayerKind:
    """The kind of a layer that can be adapted."""
    kind = find_kind(layer)
    assert kind is not None
    return kind


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' `Conv1D`, a Linear with a weight `(in, out)`, as in GPT-2."""
    return isinstance(layer, loaded_class("transformers.pytorch_utils", "Conv1D"))


def weight_name(kind: LayerKind) -> str:
    """The name of the rotated parameter. For attention, it contains the projections of q, k and v."""
    return "in_proj_weight" if kind == "attention" else "weight"


def weight_place(layer: nn.Module) -> tuple[nn.Module, str]:
    """The module that has the rotated parameter, and the name of the parameter in this module."""
    if isinstance(layer, ExpertsWeight):
        return layer.owner, layer.parameter
    return layer, packed_name(layer) if is_packed(layer) else weight_name(kind_of(layer))


def held_weight(layer: nn.Module) -> Tensor | None:
    """The parameter that is rotated, or the packed weight of a layer of another library."""
    owner, name = weight_place(layer)
    return owner._parameters.get(name, owner._buffers.get(name))


def weight_entry(path: str, layer: nn.Module) -> str:
    """The `state_dict` key of the rotated parameter, for a layer with this path in the model."""
    owner, name = weight_place(layer)
    place = path if owner is layer else path.rpartition(".")[0]
    return f"{place}.{name}".lstrip(".")


def layer_of_entry(root: nn.Module, entry: str) -> str:
    """The path of the layer that rotates a parameter, if it is adapted: the inverse of `weight_entry`."""
    owner, _, name = entry.rpartition(".")
    is_of_experts = CHILD + name in root.get_submodule(owner)._modules
    return f"{owner}.{CHILD}{name}".lstrip(".") if is_of_experts else owner


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter while its layer runs. ZeRO-3 of DeepSpeed frees parameters between the calls."""
    return getattr(parameter, "ds_shape", parameter.shape)


def width_of(layer: nn.Module) -> int:
    """The length `d` of a layer's reflection vectors: one row of the weight, flattened."""
    if isinstance(layer, ExpertsWeight):
        return layer.width
    if quant_scheme_of(layer) is not None:
        return int(layer.in_features)  # type: ignore[arg-type]  # the shape of a packed weight is unrelated
    weight: Tensor = layer._parameters[weight_name(kind_of(layer))]  # type: ignore[assignment]
    shape = full_shape(weight)
    return shape[0] if is_conv1d(layer) else shape[1:].numel()


def describe(layer: nn.Module) -> str:
    """Describe a layer briefly, for tables and errors: `Conv2d 8->16 3x5`."""
    if isinstance(layer, nn.Linear):
        return f"Linear {layer.in_features}->{layer.out_features}"
    if is_conv1d(layer):
        weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
        return "Conv1D {}->{}".format(*full_shape(weight))
    if isinstance(layer, nn.MultiheadAttention):
        return f"Attention {layer.embed_dim}->3x{layer.embed_dim}"
    if isinstance(layer, ExpertsWeight):
        return layer.extra_repr()
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sizes = f" {layer.in_features}->{layer.out_features}" if is_packed(layer) else ""
        return type(layer).__name__ + sizes
    size = "x".join(map(str, layer.kernel_size))
    return f"{kind_of(layer).capitalize()} {layer.in_channels}->{layer.out_channels} {size}"
