"""Rewrites of `torch.fx` graphs, one `PassBase` per file: match, insert, fold, verify, freeze, lower.

Passes are independent of models and of each other. Each takes a graph module and returns a `PassResult`; what it found
is stored in `node.meta["hra"]` (`hra_fx.layers.target.NodeTag`).
"""
