"""Products of an adapted layer in eager mode, from the factors of its reflections.

Tracers, exporters and functorch transforms use the plain formulas of `hra_fx.functional.householder` instead.
"""
