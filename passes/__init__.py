"""Rewrites of `torch.fx` graphs, one `PassBase` per file: match, insert, fold, verify, freeze, lower.

Passes are independent of models and of each other. Each pass takes a graph module, returns a `PassResult`, and stores
its marks in `node.meta["hra"]` (`hra_fx.layers.target.NodeTag`).
"""
