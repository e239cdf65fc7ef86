"""Questions about a traced value that have one answer, whatever the value is: asserts, and `isinstance(tensor, list)`.

An assert becomes a node that raises as the assert would. A value that is certainly a tensor is no list and no number.
"""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import operator
import types
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from hra_fx.layers.class_swap import original_class
from hra_fx.tracing.inplace_ops import SPECIAL_METHODS

_NO_TENSORS = (list, tuple, dict, set, frozenset, str, bytes, int, float, complex, bool)

#: Layers of torch that give one tensor.
_LAYERS = frozenset(
    {
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding, nn.Flatten, nn.Upsample),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm2d),
        *(
            nn.ReLU,
            nn.ReLU6,
            nn.LeakyReLU,
            nn.PReLU,
            nn.GELU,
            nn.SiLU,
            nn.Mish,
            nn.ELU,
            nn.Sigmoid,
            nn.Tanh,
            nn.Softmax,
        ),
        *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Dropout, nn.Dropout2d, nn.Dropout3d),
        *(nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.PixelShuffle, nn.ZeroPad2d),
    }
)
_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(torch.cat, torch.stack, torch.matmul, torch.bmm, torch.einsum, torch.relu, torch.sigmoid, torch.tanh),
        *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.softmax, torch.roll),
        *(
            F.linear,
            F.conv2d,
            F.layer_norm,
            F.batch_norm,
            F.group_norm,
            F.interpolate,
            F.pad,
            F.scaled_dot_product_attention,
        ),
        *(F.relu, F.gelu, F.silu, F.softmax, F.dropout, F.sigmoid, F.tanh, F.avg_pool2d, F.adaptive_avg_pool2d),
    }
)
#: Operators and methods that give one tensor where their first operand is one.
_OPERATORS: frozenset[Any] = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.matmul, operator.pow),
        *(operator.neg, operator.getitem, *SPECIAL_METHODS.values()),
    }
)
_METHODS = frozenset(
    {
        *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"),
        *("expand_as", "repeat", "contiguous", "clone", "detach", "to", "float", "double", "half", "type_as"),
        *("mean", "sum", "softmax", "sigmoid", "relu", "tanh", "exp", "sqrt", "rsqrt", "pow", "abs", "neg"),
        *("clamp", "add", "sub", "mul", "div", "matmul", "masked_fill", "roll", "flip", "movedim", "swapaxes"),
        *("add_", "sub_", "mul_", "div_", "relu_", "amax", "amin"),
    }
)


def is_certainly_tensor(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node of a graph gives a tensor at each call.

    Args:
        node: one that a trace has made so far.
        root: of the trace; its placeholders are tensors.
    """
    while True:
        if node.op == "placeholder":
            return True
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            owner = root.get_submodule(path)
            return owner._parameters.get(name) is not None or owner._buffers.get(name) is not None
        if node.op == "call_module":
            layer = root.get_submodule(str(node.target))
            kind = original_class(layer)
            if kind is not nn.Identity:
                return kind in _LAYERS or (kind is nn.MaxPool2d and not layer.return_indices)
        elif node.op == "call_function" and (node.target in _FUNCTIONS or _is_pooling(node)):
            return True
        elif not (node.op == "call_method" and node.target in _METHODS) and node.target not in _OPERATORS:
            return False
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]


def _is_pooling(node: fx.Node) -> bool:
    # The seventh argument is return_indices, with which it gives a pair.
    return node.target is F.max_pool2d and len(node.args) <= 6 and node.kwargs.get("return_indices") in (None, False)


def asks_for_no_tensor(frame: types.FrameType) -> bool:
    """Whether each `isinstance` in the line that a frame is at asks for types that no tensor has.

    That is known where they are named: `isinstance(x, (list, tuple))`.
    """
    questions = _questions(frame.f_code.co_filename).get(frame.f_lineno, [])
    kinds = [kind for question in questions for kind in _kinds(question.args[1], frame)]
    return bool(kinds) and all(kind in _NO_TENSORS for kind in kinds)


def is_assertion(frame: types.FrameType) -> bool:
    """Whether a frame is about to look at a condition of an `assert`, which raises, uncaught, if it is false."""
    code = frame.f_code
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "NOT_TAKEN")]
    at = next((place for place, step in enumerate(steps) if step.offset == frame.f_lasti), -1)
    if at >= 0 and steps[at].opname == "TO_BOOL":
        at += 1
    if not 0 <= at < len(steps) - 1 or not steps[at].opname.startswith("POP_JUMP"):
        return False
    if steps[at].opname.endswith("IF_TRUE"):
        otherwise: dis.Instruction | None = steps[at + 1]
    elif steps[at].opname.endswith("IF_FALSE"):
        otherwise = next((step for step in steps if step.offset == steps[at].argval), None)
    else:
        return False
    return otherwise is not None and _raises_assertion(otherwise) and not _may_catch(frame)


def _raises_assertion(step: dis.Instruction) -> bool:
    return step.opname == "LOAD_ASSERTION_ERROR" or (
        step.opname == "LOAD_COMMON_CONSTANT" and "AssertionError" in step.argrepr
    )


def _may_catch(frame: types.FrameType | None) -> bool:
    """Whether some code of the model, from here up to the trace, handles exceptions."""
    while frame is not None and frame.f_globals.get("__name__", "") != "hra_fx.tracing.trace":
        home = frame.f_globals.get("__name__", "").split(".")[0]
        handlers = getattr(frame.f_code, "co_exceptiontable", None)
        if handlers is None:  # Python 3.10
            handlers = any(step.opname.startswith("SETUP_") for step in dis.get_instructions(frame.f_code))
        if handlers and home not in ("torch", "hra_fx"):
            return True
        frame = frame.f_back
    return False


def _kinds(node: ast.expr, frame: types.FrameType) -> list[Any]:
    if isinstance(node, ast.Tuple):
        return [kind for element in node.elts for kind in _kinds(element, frame)]
    if not isinstance(node, ast.Name) or node.id in frame.f_locals or node.id in frame.f_globals:
        return [None]
    return [getattr(builtins, node.id, None)]


def only_speaks(frame: types.FrameType) -> bool:
    """Whether the line that a frame is at belongs to an assertion or an error, where a value may stand in the words."""
    return frame.f_lineno in _words(frame.f_code.co_filename)


@functools.cache
def _words(path: str) -> frozenset[int]:
    """The lines of a file that are part of `torch._assert(...)`, `assert` or `raise`."""
    tree = _tree(path)
    speaking = [node for node in (ast.walk(tree) if tree else ()) if _is_speaking(node)]
    return frozenset(line for node in speaking for line in _lines(node))


def _is_speaking(node: ast.AST) -> bool:
    match node:
        case ast.Assert() | ast.Raise():
            return True
        case ast.Expr(ast.Call(ast.Name("_assert") | ast.Attribute(attr="_assert"))):
            return True
    return False


@functools.cache
def _questions(path: str) -> dict[int, list[ast.Call]]:
    """Line of a file -> the calls of `isinstance` that it has a part of."""
    found: dict[int, list[ast.Call]] = {}
    tree = _tree(path)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            for line in _lines(node):
                found.setdefault(line, []).append(node)
    return found


def _lines(node: Any) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


@functools.cache
def _tree(path: str) -> ast.Module | None:
    try:
        with open(path, encoding="utf-8") as file:
            return ast.parse(file.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
