"""Products of an adapted layer in eager mode, from the factors of its reflections.

Skinny matrices are laid out as `(k, n)` and `(k, d)`: BLAS multiplies short, wide matrices several times faster than
tall, narrow ones. Tracers, exporters and functorch transforms get the plain formulas of
`hra_fx.functional.householder` instead.
"""
