"""What a call of a model computes and changes, in a form that can be compared."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import custom_functions, pytree
from hra_fx.errors import CaptureError
from hra_fx.example_inputs import Call, clone_inputs
from hra_fx.layers.target import ADAPTER_CHILDREN, FACTORS

#: Attributes of every module. Parameters, hooks and others are compared in other ways.
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_OPAQUE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module)
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_DEPTH = 4
#: The scale of gradients.
_LARGE = 1000.0
_RANDOM, _FUNCTIONS, _GRADIENT = "the random generators", "custom autograd functions", "the gradient of "


def attributes(model: nn.Module) -> dict[str, Any]:
    """The buffers and attributes of all modules, with the items of containers and of objects in them, by name.

    Tensors are copied; objects that cannot be compared by value are represented by their type.
    """
    found: dict[str, Any] = {}
    seen = set[int]()

    def collect(name: str, value: Any, depth: int) -> None:
        is_value = isinstance(value, _VALUES)
        if isinstance(value, Tensor):
            found[name] = value.detach().clone()
        else:
            found[name] = value if is_value else type(value)
        if depth and id(value) not in seen and not (is_value or isinstance(value, (Tensor, *_OPAQUE))):
            seen.add(id(value))
            for item, each in _items(value):
                collect(f"{name}{item}", each, depth - 1)

    for path, part in model.named_modules():
        if is_of_adapter(path):
            continue
        for name, value in (vars(part) | part._buffers).items():
            if name not in _OF_TORCH:
                collect(f"{path}.{name}".lstrip("."), value, _DEPTH)
    return found


def is_of_adapter(path: str) -> bool:
    """Whether a module belongs to an adapter."""
    return not ADAPTER_CHILDREN.isdisjoint(path.split(".")) or path == FACTORS


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield ".items", str(sorted(map(repr, value)))
    elif not type(value).__module__.startswith(("torch.", "logging")):
        if hasattr(value, "__dict__"):
            yield from ((f".{key}", item) for key, item in vars(value).items())
        else:  # a deque, an array of NumPy, an object with slots
            with suppress(Exception):
                yield ".state", pickle.dumps(value)


def attribute_changes(before: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The names of the attributes that are not as before."""
    after = attributes(model)
    return [name for name in {**before, **after} if not is_same(before.get(name, "none"), after.get(name, "none"))]


def _named_leaves(output: Any) -> dict[str, Any]:
    """The tensors and other values in an output, by their places."""
    try:
        return {pytree.keystr(path): value for path, value in pytree.tree_flatten_with_path(output)[0]}
    except ValueError:  # its class does not name its fields
        return {f" {index}": value for index, value in enumerate(pytree.tree_leaves(output))}


def observe(
    module: nn.Module, call: Call, names: Sequence[str], parameters: Mapping[str, Tensor], *, has_grad: bool
) -> dict[str, Any]:
    """Run a call. Returns everything that must be equal, by name: also gradients of `parameters` and inputs."""
    leaves = {name: value for name, value in parameters.items() if value.requires_grad}

    def name_of(path: Any) -> str:
        _, first, *rest = path
        name = first.key if hasattr(first, "key") else "".join(names[first.idx : first.idx + 1])
        return f"its input {name or first}{pytree.keystr(tuple(rest))}"

    def with_gradient(path: Any, value: Any) -> Any:
        if not has_grad or not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        leaves[name_of(path)] = value.requires_grad_()
        return value.clone()  # a forward may write into it

    args, kwargs = pytree.tree_map_with_path(with_gradient, clone_inputs(call))
    # fx would print an error of a graph before it raises it.
    run = nn.Module.__call__ if isinstance(module, fx.GraphModule) else type(module).__call__
    output = run(module, *args, **kwargs)
    found = {_RANDOM: random_states(), "the type of its output": pytree.tree_structure(output)}
    outputs = {f"its output{name}": value for name, value in _named_leaves(output).items()}
    found |= outputs | {name_of(path): value for path, value in pytree.tree_flatten_with_path((args, kwargs))[0]}
    if has_grad:
        tensors = [value for value in outputs.values() if isinstance(value, Tensor)]
        found |= {f"requires_grad of output {index}": value.requires_grad for index, value in enumerate(tensors)}
        found |= {f"{_GRADIENT}{name}": value for name, value in _gradients(leaves, tensors).items()}
        found[_FUNCTIONS] = _custom_functions(tensors)
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in found.items()}


def _gradients(leaves: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> dict[str, Any]:
    """The gradients of a weighted sum of all outputs, large enough for a hook that clips them.

    A sum of squares would be constant if an output is normalized.
    """
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in outputs if x.requires_grad]
    losses = [
        (x * torch.arange(x.numel(), device=x.device).view(x.shape).sin().mul(_LARGE).to(x.dtype)).sum() for x in parts
    ]
    found = torch.autograd.grad(losses, list(leaves.values()), allow_unused=True) if losses and leaves else ()
    given = {name: x for name, x in zip(leaves, found, strict=False) if x is None or x.numel()}
    # Compared with the largest gradient, a small one may be rounding noise.
    largest = {name: 0.0 if x is None else float(x.abs().max()) for name, x in given.items()}
    noise = 16 * max(largest.values(), default=0.0)
    is_noise = {name: x is not None and largest[name] < noise * torch.finfo(x.dtype).eps for name, x in given.items()}
    return {name: torch.zeros_like(x) if x is not None and is_noise[name] else x for name, x in given.items()}


def _custom_functions(outputs: Iterable[Tensor]) -> set[str]:
    """The names of the custom autograd functions in the backward graph of some outputs."""
    seen, todo = set[Any](), [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    # Adapters in eager mode have functions that those in a graph do not have.
    return {cls.__name__ for cls in custom_functions(seen) if not cls.__module__.startswith("hra_fx.")}


def random_states() -> list[Any]:
    """The states of the generators of torch, Python and, if it is imported, NumPy; they compare by value."""
    numpy: Any = sys.modules.get("numpy")
    return [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()) if numpy else ""]


def is_same(wanted: Any, found: Any) -> bool:
    """Whether two values are equal. A graph returns `None` for objects of other types, such as a cache."""
    if isinstance(wanted, Tensor):
        return isinstance(found, Tensor) and wanted.dtype is found.dtype and _is_close(found, wanted)
    if not isinstance(wanted, (*_VALUES, type, list, set, pytree.TreeSpec)):
        return found is None or type(found) is type(wanted)
    return type(wanted) is type(found) and bool(wanted == found or wanted != wanted)


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to half of the digits of their dtype, and to 2 % in half precision."""
    limit = min(torch.finfo(one.dtype).eps ** 0.5, 0.02) if one.is_floating_point() or one.is_complex() else 0.0
    finite = other[other.isfinite()] if limit else other
    scale = float(finite.abs().max()) if limit and finite.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=limit, atol=limit * scale, equal_nan=True)


def is_near(wanted: Any, found: Any) -> bool:
    """Whether a tensor is the same but for rounding in half precision and its dtype. Other values are not compared."""
    if not isinstance(wanted, Tensor) or not wanted.is_floating_point():
        return True
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    one, other = found.double().nan_to_num(), wanted.double().nan_to_num()
    return float((one - other).norm()) <= 0.05 * float(other.norm()) + 1e-6


def shown(value: Any, other: Any) -> str:
    """A value as text; of a tensor, the first item that differs from another one."""
    if not isinstance(value, Tensor):
        return str(value)[:100]
    if not isinstance(other, Tensor) or value.shape != other.shape or value.dtype is not other.dtype:
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)}"
    place = int((value != other).flatten().int().argmax())
    return f"{value.flatten()[place].item():.6g} at {place}" if value.numel() > 1 else f"{value.item():.6g}"


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> tuple[str, str] | None:
    """The name of the first thing that differs, and both values."""
    custom = ", ".join(sorted(wanted.pop(_FUNCTIONS, set()) - found.pop(_FUNCTIONS, set())))
    chance, other = wanted.pop(_RANDOM), found.pop(_RANDOM)
    name = next((name for name, value in wanted.items() if not is_same(value, found.get(name, "none"))), None)
    # A gradient of zero says nothing about the backward of such a function: another example may show a difference.
    if custom and (
        name or any(key.startswith(_GRADIENT) and x is not None and not x.any() for key, x in wanted.items())
    ):
        raise CaptureError(f"it calls the custom autograd function {custom}, whose backward a graph drops")
    if chance[1:] != other[1:] or (name is None and chance != other):
        raise CaptureError("it draws random numbers from Python or NumPy, or seeds a generator, once in a trace")
    if name is None:
        return None
    one, other = wanted[name], found.get(name, "none")
    return name, f"{shown(one, other)}, in its graph {shown(other, one)}"
