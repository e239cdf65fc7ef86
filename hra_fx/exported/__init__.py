"""Graphs that the user captured: exported programs, and `fx.GraphModule`s of aten operators.

Importing it registers the operator `hra_fx::rotate`, without which `torch.export.load` cannot read a program that
carries reflections.
"""

from hra_fx.exported import operators as operators
