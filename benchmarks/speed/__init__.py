"""Speed of training and inference compared with the base model and PEFT's methods, interleaved in one process.

    PYTHONPATH=benchmarks python -m speed --quick       (or: make bench-quick; make bench for all of it)

`methods.py` has the methods, `models.py` the models, `grid.py` the sizes, and `table.py` the table.
"""
