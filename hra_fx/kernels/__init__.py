"""Reflections as single autograd nodes for eager mode, with few, well-shaped matrix products and little saved memory.

Skinny matrices are laid out as `(k, n)` and `(k, d)`: BLAS multiplies short, wide matrices several times faster than
tall, narrow ones. Tracers, exporters and functorch transforms get the plain formulas of
`hra_fx.functional.householder` instead.
"""
