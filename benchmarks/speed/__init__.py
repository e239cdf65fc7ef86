"""How fast training and inference are beside the base model and PEFT's methods, in one process, in turns.

    PYTHONPATH=benchmarks python -m speed --quick       (or: make bench-quick; make bench for all of it)

`methods.py` says who takes part, `models.py` in what, `grid.py` in which sizes, `lines.py` what must come of it.
"""
