"""Find the quantization scheme of a layer by its class or the class of its weight."""

from __future__ import annotations

import sys

from torch import nn

from hra_fx.layers.quantized.bnb import EightBit, FourBit
from hra_fx.layers.quantized.hqq import HQQ
from hra_fx.layers.quantized.other import GPTQModel, Other, tensors_of
from hra_fx.layers.quantized.scheme import QuantScheme
from hra_fx.layers.quantized.torchao import TorchAO

#: Classes of layers, by their module. Subclasses have the same scheme.
_LAYERS: tuple[tuple[str, str, type[QuantScheme]], ...] = (
    ("bitsandbytes.nn", "Linear4bit", FourBit),
    ("bitsandbytes.nn", "Linear8bitLt", EightBit),
    ("hqq.core.quantize", "HQQLinear", HQQ),
    ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear", GPTQModel),
)


def quant_scheme_of(layer: nn.Module) -> QuantScheme | None:
    """The scheme of a linear layer of another library; `None` for layers with a plain weight, and other modules."""
    for place, name, scheme in _LAYERS:
        if (cls := _loaded(place, name)) is not None and isinstance(layer, cls):
            return scheme(cls)
    if isinstance(layer, nn.Linear):
        cls = _loaded("torchao.utils", "TorchAOBaseTensor")
        return TorchAO(nn.Linear) if cls is not None and isinstance(layer._parameters.get("weight"), cls) else None
    return Other(nn.Linear) if is_foreign_linear(layer) else None


def is_foreign_linear(layer: nn.Module) -> bool:
    """Whether a module looks like a linear layer: it has `in_features`, `out_features`, tensors and no children.

    torch.ao's layers are left out: they hide their weight, and some take quantized inputs.
    """
    sizes = vars(layer).get("in_features"), vars(layer).get("out_features")
    if isinstance(layer, nn.Linear) or not all(type(size) is int for size in sizes):
        return False
    inside = set(layer._modules) - {"hra_u", "hra_saved"}  # constants of `target.py`, which imports this file
    return not inside and bool(tensors_of(layer)) and not type(layer).__module__.startswith("torch.ao.")


def packed_name(layer: nn.Module) -> str:
    """The name of the packed weight of a layer of another library: its largest parameter or buffer."""
    return next(iter(tensors_of(layer)))


def _loaded(module: str, name: str) -> type | None:
    """A class of a library. If the library is not loaded, no object has this class."""
    found: type | None = getattr(sys.modules.get(module), name, None)
    return found
