"""Which modules may be part of a region at all: what can be said before the forward is run."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import types
from typing import Any

from torch import fx, nn

from hra_fx.layers.class_swap import original_class
from hra_fx.sources import functions_of, names_below_self, reached_definitions
from hra_fx.tracing.call_signature import optional_arguments
from hra_fx.tracing.returns_values import definition_of

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def why_not_root(module: nn.Module, *, is_model: bool) -> str | None:
    """Why a module cannot be the root of a region, if it cannot.

    Only the model itself may have optional arguments, which the graph then holds at their defaults (a call that gives
    one runs the Python forward): how inner modules are called is not known without a call. `is_model` says so of one
    whose calls were observed too.
    """
    if "forward" in vars(module):
        return "its forward is set on the instance, and a class cannot override that"
    if isinstance(module, fx.GraphModule):
        return "it is a GraphModule, whose forward is its user's own graph"
    if question := _unseen_question(_kind(module)):
        return question
    if not is_model and (optional := optional_arguments(type(module).forward)):
        return f"forward has optional arguments ({', '.join(optional)}), and no call is known that fixes them"
    return None


def why_not_inlined(module: nn.Module, recorded: tuple[type, ...]) -> str | None:
    """Why a module's forward cannot be dissolved into the graph around it, if it cannot."""
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "it has hooks, which would not run"
    if "forward" in vars(module):
        return "its forward is set on the instance"
    if question := _unseen_question(_kind(module)):
        return question
    if hasattr(module, "gradient_checkpointing") and hasattr(module, "_gradient_checkpointing_func"):
        return "it may checkpoint its activations, which would not happen"
    if any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__):
        return "it may checkpoint its activations, which would not happen"
    if isinstance(module, recorded):
        return "transformers records its outputs by hooks, which would not run"
    return None


def recorded_classes(model: nn.Module) -> tuple[type, ...]:
    """Classes whose outputs transformers collects, of all models inside `model` (`_can_record_outputs`)."""
    found: list[type] = []
    for module in model.modules():
        recorders = getattr(module, "_can_record_outputs", None) or {}
        for entry in recorders.values():
            for recorder in entry if isinstance(entry, list) else [entry]:
                target = getattr(recorder, "target_class", recorder)
                if isinstance(target, type):
                    found.append(target)
    return tuple(dict.fromkeys(found))


def _kind(module: nn.Module) -> Any:
    return original_class(module)


_QUESTIONS = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_tensor")


def _asks_identity(node: ast.Compare) -> bool:
    """`a is b` or `a.b is ...`; not `a is None` (arguments are known to be tensors), and not of what `self` holds."""
    if not any(isinstance(operation, (ast.Is, ast.IsNot)) for operation in node.ops):
        return False
    sides = [side for side in (node.left, *node.comparators) if not isinstance(side, ast.Constant)]
    foreign = [side for side in sides if not names_below_self(side)]
    attribute = any(isinstance(side, ast.Attribute) for side in foreign)
    return attribute or (len(foreign) > 1 and all(isinstance(side, ast.Name) for side in foreign))


@functools.cache
def _unseen_question(kind: Any) -> str | None:
    """A question in a forward, or in a function that it calls, that its trace would not notice."""
    for definitions in reached_definitions(kind).values():
        for definition in definitions:
            if question := _question_in(definition):
                return question
            space = vars(sys.modules.get(kind.__module__, ast))
            for function in functions_of(definition, space):
                if question := _question_of(function):
                    return f"{question} (in {function.__qualname__})"
    return None


@functools.cache
def _question_of(function: types.FunctionType) -> str | None:
    definition = definition_of(inspect.unwrap(function))
    return _question_in(definition, of_torch=False) if definition else None


def _question_in(definition: ast.FunctionDef, *, of_torch: bool = True) -> str | None:
    """`type(value)`, `id(value)`, `a is b`, or a question of torch under its bare name."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Compare) and _asks_identity(node):
            return "it asks whether a value is the same object as another, and a traced value never is"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        of_self = bool(node.args) and isinstance(node.args[0], ast.Name) and node.args[0].id == "self"
        if node.func.id in ("type", "callable", "id") and not of_self:
            return f"it asks for the type of a value ({node.func.id}), and a traced value has none"
        if of_torch and node.func.id in _QUESTIONS:
            return f"it asks {node.func.id}(), whose answer may change between calls"
    return None
