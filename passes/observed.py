"""What a call of a model computes and changes, in a form that can be compared."""

from __future__ import annotations

import io
import pickle
import random
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import custom_functions, know_dataclasses, pytree
from hra_fx.example_inputs import Call, clone_inputs
from hra_fx.layers.target import ADAPTER_CHILDREN, FACTORS

#: Attributes of every module, which are compared in other ways, or not at all.
_OF_TORCH = frozenset(vars(nn.Module()))
_OPAQUE = (type, FunctionType, MethodType, ModuleType, nn.Module, fx.Proxy)
_VALUES = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, pytree.TreeSpec)
#: The scale of gradients, large enough for a hook that clips them.
_SCALE = 1000.0


class _Pickler(pickle.Pickler):
    """Pickles values by their content, and functions, classes, modules and what has no content by their identity."""

    def persistent_id(self, obj: Any) -> Any:
        """What stands for an object that is not pickled; `None` for any other."""
        if isinstance(obj, Tensor):
            return str(obj.dtype), obj.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return id(obj) if isinstance(obj, _OPAQUE) else None

    def reducer_override(self, obj: Any) -> Any:
        """How an object is pickled that cannot be pickled, such as a lock: by its attributes."""
        try:
            obj.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            return NotImplemented
        except Exception:  # any class may refuse it
            content = obj() if isinstance(obj, weakref.ref) else getattr(obj, "__dict__", None)
            return tuple, ((id(obj), content),)


def _content(value: Any) -> Any:
    """The content of a value as bytes; its type, if it cannot be pickled."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(value)
    except Exception:  # any class may refuse it
        return type(value)
    return buffer.getvalue()


def attributes(model: nn.Module) -> dict[str, Any]:
    """The attributes of all modules by name, as bytes, without parameters, buffers and children."""
    parts = [(path, part) for path, part in model.named_modules() if not is_of_adapter(path)]
    return {
        f"{path}.{name}".lstrip("."): _content(value)
        for path, part in parts
        for name, value in vars(part).items()
        if name not in _OF_TORCH
    }


def is_of_adapter(path: str) -> bool:
    """Whether a module belongs to an adapter."""
    return not ADAPTER_CHILDREN.isdisjoint(path.split(".")) or path == FACTORS


def changed_attribute(before: dict[str, Any], model: nn.Module) -> str | None:
    """The name of an attribute that is not as before."""
    after = attributes(model)
    return next((name for name in before | after if before.get(name) != after.get(name)), None)


def observe(module: nn.Module, call: Call, parameters: Mapping[str, Tensor], *, grad: bool) -> dict[str, Any]:
    """Run a call. Returns everything that must be equal, by name; with `grad`, also the gradients."""
    leaves, spec = pytree.tree_flatten(clone_inputs(call))
    floats = [index for index, x in enumerate(leaves) if grad and isinstance(x, Tensor) and x.is_floating_point()]
    trained = {f"its input {index}": leaves[index].requires_grad_() for index in floats}
    trained |= {name: value for name, value in parameters.items() if value.requires_grad}
    copies = {id(leaves[index]): leaves[index].clone() for index in floats}  # a forward may write into them
    for index in floats:
        leaves[index] = copies[id(leaves[index])]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    # fx would print an error of a graph before it raises it.
    run = nn.Module.__call__ if isinstance(module, fx.GraphModule) else type(module).__call__
    output = without_unknown(run(module, *args, **kwargs))
    outputs = pytree.tree_leaves(output)
    tensors = [value for value in outputs if isinstance(value, Tensor)]
    found: dict[str, Any] = {"its use of random numbers of Python or NumPy": _python_random()}
    if grad:
        found["its set of custom autograd functions"] = _custom_functions(tensors)
    found["the type of its output"] = pytree.tree_structure(output)
    found |= {f"its output {index}": value for index, value in enumerate(outputs)}
    found |= {f"its input {index}": value for index, value in enumerate(leaves) if isinstance(value, Tensor)}
    found |= {f"its buffer {name}": value for name, value in module.named_buffers()}
    if grad:
        found |= {f"requires_grad of output {index}": value.requires_grad for index, value in enumerate(tensors)}
        found |= {f"the gradient of {name}": value for name, value in _gradients(trained, tensors).items()}
    found["its use of random numbers"] = random_states()
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in found.items()}


def without_unknown(output: Any) -> Any:
    """An output with `None` in place of objects that a graph cannot create, such as a cache."""
    know_dataclasses(output)
    known = (Tensor, *_VALUES, torch.SymInt, torch.SymFloat, torch.SymBool)
    return pytree.tree_map(lambda value: value if isinstance(value, known) else None, output)


def _gradients(leaves: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """The gradients of a weighted sum of all outputs. A sum of squares would be constant if one is normalized."""
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in outputs if x.requires_grad]
    losses = [
        (x * torch.arange(x.numel(), device=x.device).view(x.shape).sin().mul(_SCALE).to(x.dtype)).sum() for x in parts
    ]
    found = torch.autograd.grad(losses, list(leaves.values()), allow_unused=True) if losses and leaves else ()
    largest = [0.0 if x is None or not x.numel() else float(x.abs().max()) for x in found]
    # Compared with the largest gradient, a small one may be rounding noise.
    noise = 16 * max(largest, default=0.0)
    return {
        name: torch.zeros_like(x) if x is not None and size < noise * torch.finfo(x.dtype).eps else x
        for name, x, size in zip(leaves, found, largest, strict=False)
    }


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


def _python_random() -> int:
    numpy: Any = sys.modules.get("numpy")  # if it is not loaded, no forward uses it
    return hash((random.getstate(), str(numpy.random.get_state()) if numpy else ""))


def random_states() -> int:
    """A hash of the states of the generators of torch, Python and NumPy."""
    return hash((_python_random(), torch.get_rng_state().numpy().tobytes()))


def difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, str] | None:
    """The name of the first thing that differs, and both values."""
    for name, one in wanted.items():
        other = found.get(name, "none")
        if not _is_same(one, other):
            return name, f"{_shown(one, other)}, in its graph {_shown(other, one)}"
    return None


def _is_same(wanted: Any, found: Any) -> bool:
    """Whether two values are equal. A graph returns `None` for objects of other types, such as a cache."""
    if isinstance(wanted, Tensor):
        return isinstance(found, Tensor) and wanted.dtype is found.dtype and _is_close(found, wanted)
    if isinstance(wanted, set):  # a graph has functions of its own for operators that torch generates them for
        return isinstance(found, set) and wanted <= found
    if isinstance(wanted, _VALUES):
        return type(wanted) is type(found) and bool(wanted == found or wanted != wanted)
    return found is None


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to half of the digits of their dtype; to 2 % in half precision, or autocast."""
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    is_half = torch.is_autocast_enabled(one.device.type)
    limit = 0.05 if is_half else min(torch.finfo(one.dtype).eps ** 0.5, 0.02)
    finite = other[other.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=limit * scale, equal_nan=True)


def _shown(value: Any, other: Any) -> str:
    """A value as text; of a tensor, the first item that differs from another one."""
    if not isinstance(value, Tensor):
        return str(value)[:100]
    if not isinstance(other, Tensor) or value.shape != other.shape or value.dtype is not other.dtype:
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)}"
    place = int((value != other).flatten().int().argmax())
    return f"{value.flatten()[place].item():.6g} at {place}"
