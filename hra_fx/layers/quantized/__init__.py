"""Quantized linear layers, and those of other libraries. None of the libraries is imported here."""

from hra_fx.layers.quantized.libraries import is_foreign_linear, packed_name, quant_scheme_of
from hra_fx.layers.quantized.linear_map import UnknownLinear

__all__ = ["UnknownLinear", "is_foreign_linear", "packed_name", "quant_scheme_of"]
