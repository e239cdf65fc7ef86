"""Correctness and speed on a CUDA device: `make bench-gpu`.

It runs in any Python that has torch, transformers and PEFT, also where the project is not installed.
"""
