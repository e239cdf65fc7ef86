"""An adapter in its LoRA form, the conversion of adapted layers, and the two files of PEFT's LoRA format.

Source of the format: PEFT 0.21, `LoraConfig` and `get_peft_model_state_dict`. All layers have the same rank, because
servers read one rank and one alpha for the whole adapter. Layers with a smaller rank are padded with zeros.

For transformers models, PEFT converts the names in a LoRA like the names in a checkpoint. Source: PEFT 0.21,
`peft.utils.transformers_weight_conversion`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hra_fx.checkpoint.folder import PREFIX
from hra_fx.compat import conversion_names, weight_conversions
from hra_fx.layers.experts_weight import parameter_of
from hra_fx.layers.target import LayerKind
from hra_fx.lora.unsupported import unsupported
from hra_fx.selection.suggestions import suffixes

#: Architecture with checkpoints that transformers converts -> names in `target_modules` that PEFT interprets as single
#: experts: it adapts their stacked parameter instead, with the sum of all ranks, and no layer with that name.
_OF_EXPERTS: Mapping[Any, Collection[str]] = {
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("gate", "w1", "w2", "w3"),
}


@dataclass(frozen=True)
class LoraLayer:
    """The LoRA form of one layer: its rows `W: (out, d)` become `W + B A`.

    Attributes:
        path: the layer's qualified name in the model.
        kind: the kind of layer.
        A: `(k, d)`, float64 on the CPU; for a convolution, `d` is the flattened `(in, *kernel)`; for experts,
            `(experts, k, d)`.
        B: `(out, k)`, float64 on the CPU; for experts, `(experts, out, k)`.
        kernel: the kernel size of a convolution; empty for other layers.
        fan_in_fan_out: whether the layer stores its weight as `(in, out)`, as transformers' `Conv1D` does.
        error: `|W Q - W - B A|_F / |W Q - W|_F`; 0 unless a smaller rank was requested.
        place: for experts, the position of the parameter among the parameters of its module.
    """

    path: str
    kind: LayerKind
    A: Tensor
    B: Tensor
    kernel: tuple[int, ...] = ()
    fan_in_fan_out: bool = False
    error: float = 0.0
    place: int = 0

    @property
    def rank(self) -> int:
        """The number of rows of `A`; 0 for a layer that the adapter does not change."""
        return self.A.shape[-2]

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return `A: (..., rank, d)` and `B: (..., out, rank)`, padded with zeros."""
        missing = rank - self.rank
        A = F.pad(self.A, (0, 0, 0, missing))
        return A, F.pad(self.B, (0, missing))


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter as LoRA, independent of the file format.

    `copies` are trained tensors (modules and biases), by their keys in PEFT's file without its prefix.
    `modules` are the paths of all modules of the model, of which `target_modules` must match only the adapted ones.
    `fields` are those of `peft.LoraConfig` that do not depend on the layers.
    `model_config` is the content of the model's `config.json`; empty if it has none.
    """

    layers: tuple[LoraLayer, ...]
    copies: Mapping[str, Tensor]
    modules: Collection[str]
    fields: Mapping[str, Any]
    model_config: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The common rank of all layers: the largest rank, at least 1."""
        return max([1, *(layer.rank for layer in self.layers)])


def exact_targets(adapted: Collection[str], modules: Collection[str]) -> list[str] | str:
    """Find the shortest names that match only the adapted layers, by PEFT's rules.

    Returns ends of paths, sorted; or a regular expression, if a path is itself the end of another path.

    >>> exact_targets(["a.q", "b.q", "a.k"], ["a", "b", "a.q", "b.q", "a.k", "b.k"])
    ['a.k', 'q']
    >>> exact_targets(["fc"], ["fc", "block", "block.fc"])
    'fc'
    """
    chosen = set(adapted)
    others = {suffix for path in modules if path not in chosen for suffix in suffixes(path)}
    short = {path: next((end for end in suffixes(path) if end not in others), None) for path in adapted}
    if None in short.values():
        return "|".join(re.escape(path) for path in adapted)
    return sorted({end for end in short.values() if end is not None})


def peft_form(adapter: LoraAdapter, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `adapter_config.json` and of `adapter_model.safetensors`.

    The factors get the dtype; trained copies keep theirs.
    """
    factors: dict[str, Tensor] = {}
    for path, layer in ((layer.path, layer) for layer in adapter.layers):
        # Cast immediately, so that only one layer has a second copy in float64.
        A, B = (factor.to(dtype).contiguous() for factor in layer.padded(adapter.rank))
        if layer.kind == "experts":
            factors |= _experts_tensors(layer, adapter.layers, A, B)
            continue
        # A convolution with as many filters as the rank.
        factors[f"{path}.lora_A.weight"] = A.reshape(len(A), -1, *layer.kernel) if layer.kernel else A
        factors[f"{path}.lora_B.weight"] = B.reshape(*B.shape, *(1 for _ in layer.kernel))
    return _config(adapter), {f"{PREFIX}{key}": tensor for key, tensor in (factors | dict(adapter.copies)).items()}


def _config(adapter: LoraAdapter) -> dict[str, Any]:
    """The fields of `peft.LoraConfig` that differ from its defaults, or that servers read."""
    parameters = parameter_targets(adapter)
    targets = [layer.path for layer in adapter.layers if layer.path not in parameters]
    return {
        **adapter.fields,
        "peft_type": "LORA",
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "target_modules": exact_targets(targets, adapter.modules),
        "target_parameters": list(parameters.values()) or None,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in adapter.layers),
        "use_rslora": False,
        "use_dora": False,
    }


def _experts_tensors(layer: LoraLayer, layers: Iterable[LoraLayer], A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The two tensors of the experts in one parameter, in the layout of PEFT's `ParamWrapper`.

    PEFT wraps a module once for each of its adapted parameters. The wrappers are nested, and the outermost one belongs
    to the last parameter. Source: `peft.tuners.lora.layer.ParamWrapper`, PEFT 0.21. From `A: (experts, rank, d)` and
    `B: (experts, out, rank)`, they are `lora_A.weight: (experts * rank, d)`, with the ranks of each expert next to each
    other, and `lora_B.weight: (out, rank * experts)`, with the experts of each rank next to each other.
    """
    owner = layer.path.rpartition(".")[0]
    outside = [one for one in layers if one.kind == "experts" and one.path.rpartition(".")[0] == owner]
    depth = sum(one.place > layer.place for one in outside)
    place = ".".join([owner, *["base_layer"] * depth]).lstrip(".")
    down, up = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return {f"{place}.lora_A.weight": down.contiguous(), f"{place}.lora_B.weight": up.contiguous()}


def parameter_targets(adapter: LoraAdapter) -> dict[str, str]:
    """The layers that PEFT finds by a parameter in `target_parameters`: path -> parameter.

    These are experts, and layers with names that PEFT interprets as single experts.
    """
    found = {layer.path: parameter_of(layer.path) for layer in adapter.layers if layer.kind == "experts"}
    # With a module of this name, transformers converts checkpoints for the model.
    if any(path.rpartition(".")[2] == "experts" for path in adapter.modules):
        names = _OF_EXPERTS.get(conversion_names().get(adapter.model_config.get("model_type", "")), ())
        linear = [layer.path for layer in adapter.layers if layer.kind == "linear"]
        found |= {path: f"{path}.weight" for path in linear if path.rpartition(".")[2] in names}
    return found


def check_names(model: Any, paths: Iterable[str]) -> None:
    """Check that PEFT finds these layers of the whole model by their names in the file."""
    kind: str | None = getattr(getattr(model, "config", None), "model_type", None)
    renamed = _renamed(model, kind)
    for path in paths:
        if not f"{PREFIX}{path}".endswith(name := renamed(path)):  # PEFT restores a prefix that is removed
            reason = f"would not be found by PEFT, which renames it to {name}, as transformers does in checkpoints"
            raise unsupported(path, "this layer", reason)


def _renamed(model: Any, kind: str | None) -> Callable[[str], str]:
    """The renaming of tensors in a checkpoint of a transformers model, if PEFT renames LoRA tensors the same way."""
    conversions = None if kind is None else weight_conversions()
    if conversions is None or conversions.get_checkpoint_conversion_mapping(kind) is None:
        return lambda path: path
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    every = conversions.get_model_conversion_mapping(model)
    renamings = [entry for entry in every if isinstance(entry, WeightRenaming)]
    return lambda path: rename_source_key(f"{path}.lora_A", renamings, [])[0].removesuffix(".lora_A")
