"""Quantized linear layers, and those of other libraries: one file for each library. None of them is imported here."""

from hra_fx.layers.quantized.call import call_quantized
from hra_fx.layers.quantized.find import is_foreign_linear, packed_name, quant_scheme_of
from hra_fx.layers.quantized.other import Other

__all__ = ["Other", "call_quantized", "is_foreign_linear", "packed_name", "quant_scheme_of"]
