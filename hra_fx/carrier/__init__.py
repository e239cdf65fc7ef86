"""Modules that carry their own rewritten forward: the object stays, its class is swapped."""
