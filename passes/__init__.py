"""Rewrites of `torch.fx` graphs, one per file: match, insert, fold.

They are independent of models and of each other, and take a graph module. The graph is their only record of what they
did: a reflection is a node that calls `<layer>.hra_u`.
"""
