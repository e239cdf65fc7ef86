"""Rewrites of `torch.fx` graphs, each a `PassBase` in a file of its own: match, insert, fold, verify.

They know nothing of models and of each other: a graph comes in, `PassResult` goes out, and what a pass found it leaves
in `node.meta["hra"]` (`hra_fx.layers.target.SiteNote`).
"""
