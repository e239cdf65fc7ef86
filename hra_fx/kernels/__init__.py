"""The factors of reflections, and the products of a layer with them.

Tracers, exporters and functorch transforms use the plain formulas of `hra_fx.functional.householder` instead.
"""
