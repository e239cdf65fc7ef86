"""What hra_fx does on a GPU, compared with the frozen base model and PEFT: `PYTHONPATH=.:benchmarks python -m gpu`.

`run.py` has the order. Needs torch, transformers and peft; nothing has to be installed of the project itself.
"""
