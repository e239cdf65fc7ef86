"""Reflections as single nodes of autograd, for plain PyTorch: in the fewest and best shaped products, with least kept.

All skinny matrices are made as `(k, n)` and `(k, d)`: BLAS is several times faster at a product that is short and wide
than at its transpose, tall and narrow. Whoever traces, exports or transforms functions gets the plain formulas of
`hra_fx.functional.householder` instead, made of operators that he knows.
"""
