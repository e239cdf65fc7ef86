"""PEFT's HRA layers with the kernels of hra_fx.

A container of hra_fx reads the vectors of a layer, so that the layer runs the same code as adapted layers. Everything
else remains PEFT's: parameters and their names, active and merged adapters, files.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.compat import fields_of_update, has_hooks, is_replica
from hra_fx.errors import UnsupportedLayerError
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.rotate import rotate_weight
from hra_fx.kernels.factors import Factors
from hra_fx.kernels.linear import linear
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.batching import factors_for
from hra_fx.layers.class_swap import SwapMixin
from hra_fx.layers.quantized import call_quantized, quant_scheme_of
from hra_fx.layers.target import describe, kind_of, width_of
from hra_fx.layers.variants import ConvAdapters, LinearAdapters

#: The open handles of `accelerate_peft`. New layers are added to those that collect them.
OPEN: list[Any] = []
_SITE = "_hra_site"


class _PeftVectors(HouseholderAdapters):
    """Reads the vectors of PEFT's layer at each use, because loading, FSDP and `to_empty` replace parameters.

    It does not have parameters, and it is not a child of the layer, so names and states stay PEFT's.
    """

    def read(self, layer: Any) -> None:
        """Read the adapters of PEFT's layer."""
        # Do not use setattr, which would register them as children.
        vars(self)["source"], vars(self)["base_layer"] = layer.hra_u, layer.get_base_layer()
        self.specs = {name: AdapterSpec(r, layer.hra_apply_GS[name]) for name, r in layer.hra_r.items()}

    def __getitem__(self, name: str) -> Any:
        return vars(self)["source"][name]

    def weight_of(self, layer: nn.Module) -> nn.Parameter:
        """The base weight."""
        weight: nn.Parameter = vars(self)["base_layer"].weight
        return weight

    def unit_chain(self, name: str, *, reverse: bool = False) -> Tensor:
        """The reflections of an adapter, `(d, r)`, in float64 (float32 on MPS), or those of `Q^T` if `reverse`."""
        vectors = self[name]
        wide = vectors.float() if vectors.device.type == "mps" else vectors.double()
        chain = plain_chain(wide, None, apply_GS=self.specs[name].apply_GS)
        return chain.flip(-1) if reverse else chain


class PeftLinearAdapters(_PeftVectors, LinearAdapters):
    """The adapters of `peft.tuners.hra.layer.HRALinear`."""


class PeftConvAdapters(_PeftVectors, ConvAdapters):
    """The adapters of `peft.tuners.hra.layer.HRAConv2d`."""


class Site(nn.Module):
    """Represents a PEFT layer when factors are computed: a module whose child `hra_u` is a container of hra_fx."""

    hra_u: PeftLinearAdapters | PeftConvAdapters

    def __init__(self, layer: Any) -> None:
        """Represent an `HRALinear` or `HRAConv2d` with its current adapters. No adapter is active."""
        super().__init__()
        base = layer.get_base_layer()
        is_conv = isinstance(base, nn.Conv2d)
        self.hra_u = PeftConvAdapters(base) if is_conv else PeftLinearAdapters(width_of(base), kind_of(base))
        self.hra_u.read(layer)


class AcceleratedLayer(SwapMixin):
    """Common base class of accelerated layers: the forward, merging, and the computation of Q."""

    _hra_makes_own = True  # PEFT calls the class to create new layers

    # Attributes of PEFT's layer, which the class is mixed into.
    base_layer: Any
    get_base_layer: Any
    hra_u: Any
    hra_r: dict[str, int]
    hra_apply_GS: dict[str, bool]
    active_adapters: list[str]
    merged_adapters: list[str]
    merged: bool
    disable_adapters: bool
    set_adapter: Any
    reset_hra_parameters: Any
    reset_hra_parameters_random: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the layer like PEFT's layer."""
        super().__init__(*args, **kwargs)
        for handle in OPEN:
            if handle.collects:
                handle.layers.add(self)

    def read_vectors(self) -> None:
        """Set up the vectors for the computation, after the layer has its adapters."""
        # This is not a child, so that parameters and states remain those of PEFT's layer.
        vars(self)[_SITE] = Site(self)

    def forget_vectors(self) -> None:
        """Undo `read_vectors`."""
        vars(self).pop(_SITE, None)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does."""
        base: Any = super()
        base.update_layer(*args, **kwargs)
        self.read_vectors()

    def acting(self) -> Site | None:
        """The vectors for the computation, or `None` if PEFT's own code runs."""
        # A replica of DataParallel shares the attributes of the original, including the vectors.
        if self.disable_adapters or self.merged or _is_tuner_layer(self.base_layer) or is_replica(self):
            return None
        site: Site = vars(self)[_SITE]
        vars(site.hra_u)["training"] = self.training
        active = tuple(name for name in self.active_adapters if name in self.hra_u)
        if site.hra_u.active != active:
            site.hra_u.set_active(active)
        return site

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the layer with the weight `W Q`, in the dtype of `x: (..., d)`."""
        site = self.acting()
        if site is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        adapters = site.hra_u
        output = self.adapted(x, adapters) if adapters.active else self.base_layer(x, *args, **kwargs)
        return output.to(x.dtype)

    def adapted(self, x: Tensor, adapters: Any) -> Tensor:
        """The output of the layer with its active adapters."""
        raise NotImplementedError

    def get_delta_weight(self, adapter_name: str, reverse: bool = False) -> Tensor:
        """`Q` of an adapter, or `Q^T`: `(d, d)` in the dtype of its vectors."""
        vectors = self.hra_u[adapter_name]
        chain = vars(self)[_SITE].hra_u.unit_chain(adapter_name, reverse=reverse)
        identity = torch.eye(chain.shape[0], dtype=chain.dtype, device=chain.device)
        return rotate_weight(identity, chain).to(vectors.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (`None`: the active ones) into the base weight, `W <- W Q`, computed in float64.

        With `safe_merge`, a weight that would not be finite raises an error and is not written.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        this: Any = self
        for name in check_adapters_to_merge(this, adapter_names):
            if name in self.hra_u:
                self._rotate_base(name, must_be_finite=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Unmerge all merged adapters from the base weight, `W <- W Q^T`, computed in float64."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.hra_u:
                self._rotate_base(name, reverse=True)

    def _rotate_base(self, name: str, *, reverse: bool = False, must_be_finite: bool = False) -> None:
        base = self.get_base_layer()
        if reason := _why_not_merged(base):
            raise UnsupportedLayerError(
                f"{describe(base)}: its weight is quantized ({reason}), so merging would round it. Load the adapter "
                "into the base model (hra_fx.load_adapter), and fold it there (hra_fx.fold(model, requantize=True))."
            )
        chain = vars(self)[_SITE].hra_u.unit_chain(name, reverse=reverse).detach()
        weight = base.weight.data
        rotated = rotate_weight(weight.to(chain.dtype), chain).to(weight.dtype)
        if must_be_finite and not bool(torch.isfinite(rotated).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        base.weight.data = rotated


class AcceleratedLinear(AcceleratedLayer):
    """`peft.tuners.hra.layer.HRALinear` that reflects its input instead of rotating its weight."""

    def adapted(self, x: Tensor, adapters: PeftLinearAdapters) -> Tensor:
        """Compute `x: (..., d)` to `(..., out)`."""
        base = self.base_layer
        if quant_scheme_of(base) is not None:
            output: Tensor = call_quantized(base, adapters.reflect(x), base)
            return output
        if not _is_plain(base, nn.Linear):  # offloaded, with hooks, or with its own forward
            output = base(adapters.reflect(x))
            return output
        if x.dtype is base.weight.dtype and (factors := factors_for(adapters, x)) is not None:
            return linear(x, cast(Factors, factors), base.weight, base.bias)
        x, weight, bias = _same_dtype(x, base)
        return F.linear(adapters.reflect(x), weight, bias)


class AcceleratedConv2d(AcceleratedLayer):
    """`peft.tuners.hra.layer.HRAConv2d`, for all groups, kernels, strides, dilations, paddings and padding modes."""

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add an adapter. PEFT's own method does not support groups, and assumes square kernels."""
        base: Any = self.get_base_layer()
        height, width = base.kernel_size
        if r <= 0 or (base.groups == 1 and height == width):
            super().update_layer(adapter_name, r, *args, **kwargs)
            return
        config = fields_of_update(args, kwargs)
        self.hra_r[adapter_name], self.hra_apply_GS[adapter_name] = r, config.apply_GS
        self.hra_u[adapter_name] = nn.Parameter(torch.empty(width_of(base), r))
        draw = self.reset_hra_parameters if config.init_weights else self.reset_hra_parameters_random
        draw(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self.read_vectors()

    def adapted(self, x: Tensor, adapters: PeftConvAdapters) -> Tensor:
        """Compute `x: (n, c, height, width)` to `(n, out, ...)`."""
        base = self.base_layer
        if not _is_plain(base, nn.Conv2d):  # for example, it standardizes its weight, which must then be W Q
            return _with_rotated_weight(base, x, adapters)
        if (output := adapters.output_of(x, base.weight, base)) is not None:
            return output
        x, weight, bias = _same_dtype(x, base)
        read = adapters.reflect(x)
        plain: Tensor = base._conv_forward(x, weight, bias)
        return plain if read is None else plain - adapters.project(read, weight)


def _with_rotated_weight(base: Any, x: Tensor, adapters: PeftConvAdapters) -> Tensor:
    weight, chain = base.weight, adapters.joint_vectors(adapters.active)
    if weight.is_meta and not x.is_meta:
        raise UnsupportedLayerError(
            f"{describe(base)}: its weight is offloaded, so W Q cannot be computed. Keep this layer on the device "
            "(device_map), or leave it out with exclude_modules."
        )
    rotated = weight if chain is None else rotate_weight(weight, chain)
    output: Tensor = torch.func.functional_call(base, {"weight": rotated}, (x,))
    return output


def _is_plain(base: nn.Module, cls: type[nn.Linear] | type[nn.Conv2d]) -> bool:
    """Whether calling a layer only runs the forward of `cls`."""
    return type(base).forward is cls.forward and "forward" not in vars(base) and not has_hooks(base)


def _same_dtype(x: Tensor, base: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast input, weight and bias to the wider dtype of input and weight, as PEFT does."""
    dtype = torch.promote_types(x.dtype, base.weight.dtype)
    return x.to(dtype), base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype)


def _is_tuner_layer(module: nn.Module) -> bool:
    """Whether there is a layer of another PEFT method between this layer and the base layer; PEFT's code handles it."""
    return hasattr(module, "get_base_layer")


def _why_not_merged(base: nn.Module) -> str | None:
    """The scheme of a quantized weight; `None` for other weights."""
    scheme, weight = quant_scheme_of(base), base.weight
    if scheme is not None:
        return scheme.description(base)
    is_wide = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    return None if is_wide else str(weight.dtype)
