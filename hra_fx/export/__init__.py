"""Captured graphs: `torch.export.ExportedProgram`s and `fx.GraphModule`s with ATen operators.

Importing this package registers the operator `hra_fx::rotate`, which `torch.export.load` needs for a program with
reflections.
"""

from hra_fx.export import program as program
