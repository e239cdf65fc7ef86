"""Speed of training and inference compared with the base model and PEFT's methods, interleaved in one process.

    PYTHONPATH=benchmarks python -m speed --quick       (or: make bench-quick; make bench for all of it)

`methods.py` says who takes part, `models.py` in what, `grid.py` in which sizes, `lines.py` what must come of it.
"""
