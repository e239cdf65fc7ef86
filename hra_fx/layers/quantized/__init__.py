"""Quantized linear layers, and those of other libraries. None of the libraries is imported here."""
