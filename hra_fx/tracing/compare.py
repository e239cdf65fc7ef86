"""Compare a graph with its model: both run the same calls, on copies, and must do the same. Every graph passes here.

    compare(model, graph, call)

The calls, in each mode: the example with gradients; other values under `no_grad`; the example again with other
parameters; masks with padding, `None` and other dtypes; other sizes. Equal must be: the outputs with their types, the
gradients of inputs and parameters, written inputs, random numbers, and everything that the calls change in the modules.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import pytree
from hra_fx.errors import CaptureError
from hra_fx.model.example_inputs import Call, clone_inputs, preserve_rng_state, seed_everything

_SEED = 20240517
#: Larger parameters share memory with the model: their values stay, and their gradients are not compared.
_LARGE = 1 << 22
#: What gets gradients; the next one, if the model cannot be run with it.
_LEVELS = ("inputs", "parameters", "")
_RANDOM, _FUNCTIONS = "the state of the random generators", "custom autograd functions"
_GRADIENT = "the gradient of "
#: For each size that may change: (index of the flat input, dimension) of all inputs with this size.
Sizes = Sequence[Sequence[tuple[int, int]]]


class Limits(NamedTuple):
    """Calls for which a graph is right.

    Attributes:
        not_one: sets of indices of sizes that must not all be 1.
        under_autocast: whether it is right under autocast, apart from rounding and dtypes.
    """

    not_one: list[frozenset[int]]
    under_autocast: bool


def compare(
    model: nn.Module, made: nn.Module, call: Call, sizes: Sizes | None = None, *, gradients: bool = True
) -> Limits:
    """Compare a graph with its model for a call, and for others like it. Neither is changed.

    Args:
        model: the model.
        made: its graph.
        call: the arguments of a call that both can run.
        sizes: those that may change. `None`: the graph must be right for all sizes, masks and dtypes that the model
            allows.
        gradients: whether gradients must be equal too.

    Returns:
        Calls for which the graph is wrong: it must refuse them.

    Raises:
        CaptureError: they differ. It names what differs, and both values.
    """
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        return Limits([], True)
    with preserve_rng_state(), torch.inference_mode(False):
        for level in _LEVELS if gradients else ("",):
            try:
                return _Comparison(model, made, level, without_gradients=not gradients).run(call, sizes)
            except _NoGradientError as error:
                failure = error
    raise CaptureError(str(failure)) from failure


def copied(model: nn.Module, keep: Iterable[Tensor] = ()) -> Any:
    """Copy a model. The tensors in `keep` are shared with the copy."""
    # Only leaves of autograd can be copied; a forward may have left other tensors in attributes.
    held = (value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor))
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in held if value.grad_fn is not None}
    memo |= {id(value): value for value in keep}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(f"it cannot be copied ({type(error).__name__}: {error})") from error


def with_shared_tensors(model: nn.Module) -> Any:
    """Copy the modules of a model, with its own parameters and buffers, for a forward that may change the modules."""
    return copied(model, chain(model.parameters(), model.buffers()))


class _NoGradientError(Exception):
    """The model cannot be run with gradients of this level."""


class _Comparison:
    """Copies of a model and its graph, which run the same calls in turns."""

    def __init__(self, model: nn.Module, made: nn.Module, level: str, *, without_gradients: bool) -> None:
        large = [value for value in model.parameters() if value.numel() > _LARGE or type(value) is not nn.Parameter]
        self._model, self._made = self._both = copied(model, large), copied(made, large)
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._large = set(map(id, large))
        self._level = level
        self._mode = ""
        for each in self._both:
            for value in self._small(each):
                value.requires_grad_(not without_gradients)
        keys = [set(each.state_dict()) for each in (model, made, self._made)]
        if odd := sorted(set.union(*keys) - set.intersection(*keys)):
            raise CaptureError(f"{odd[0]} is in the state_dict of only one of the model, its graph and a copy of it")

    def run(self, call: Call, sizes: Sizes | None) -> Limits:
        """Compare in both modes, and first in a mixed mode."""
        wrong, under_autocast = list[frozenset[int]](), True
        is_mixed = len({part.training for part in self._model.modules()}) > 1
        for mode in (None, False, True)[not is_mixed :]:
            self._mode = "" if mode is None else f"in {'train' if mode else 'eval'} mode, "
            self._set_mode(mode)
            other = self._compare_two_calls(call)
            self._change_parameters()
            self._set_mode(mode)
            self._compare(call, "the example with other parameters", grad=True)
            # Either may raise an error for these calls, so what they write into buffers is not compared.
            buffers = [(part._buffers, _cloned(part._buffers)) for each in self._both for part in each.modules()]
            if not self._is_same_under_autocast(call):
                if sizes is None:
                    raise CaptureError(f"{self._mode}its graph differs under autocast")
                under_autocast = False
            for chosen, what, variant in _variants(call, other, sizes):
                if any(known <= chosen for known in wrong):
                    continue
                try:
                    self._compare(variant, what, may_fail=True, errors=sizes is not None)
                except CaptureError:
                    if sizes is None or not chosen:
                        raise
                    wrong.append(chosen)
                for now, before in buffers:
                    now.update(_cloned(before))
        if sizes is None:
            self._compare_other_dtype(call)
        return Limits(wrong, under_autocast)

    def _small(self, module: nn.Module) -> list[nn.Parameter]:
        every = [value for value in module.parameters() if id(value) not in self._large]
        return [value for value in every if value.is_floating_point()]

    def _set_mode(self, mode: bool | None) -> None:
        for each in self._both if mode is not None else ():
            each.train(not mode)  # what a model does when its mode changes, such as clearing a cache
            each.train(mode)

    def _change_parameters(self) -> None:
        for each in self._both:
            seed_everything(_SEED)
            for value in self._small(each):
                spread = 0.1 * float(value.detach().float().square().mean().sqrt().nan_to_num()) + 1e-3
                value.data += spread * torch.randn(value.shape).to(value)

    def _compare_two_calls(self, call: Call) -> Call:
        """Compare the example and other values. Returns these values; the example, if the model takes no others."""
        before = attributes(self._model)
        self._compare(call, "the example", grad=True)
        first = [attributes(each) for each in self._both]
        others = (other for other in _of_other_values(call) if self._compare(other, "other values", may_fail=True))
        if (other := next(others, None)) is None:
            self._compare(call, "the example again")
        second = [attributes(each) for each in self._both]
        buffers = dict(self._model.named_buffers())
        for name in first[0] | second[0]:
            one, wanted, two, given = (
                part.get(name, before.get(name)) for pair in zip(first, second, strict=True) for part in pair
            )
            # What only the first call changes, such as a cache, has done no harm.
            is_state = name in buffers or name.endswith("training") or not (_same(one, wanted) and _same(two, given))
            if is_state and not _same(wanted, given):
                values = f"{_shown(wanted, given)}, in its graph {_shown(given, wanted)}"
                raise CaptureError(f"{self._mode}after two calls, {name} is {values}")
        return other or call

    def _compare(
        self, call: Call, what: str, *, grad: bool = False, may_fail: bool = False, errors: bool = False
    ) -> bool:
        """Run a call with both, and raise an error if they differ. Returns whether the model could run it.

        `may_fail`: either may raise an error instead; with `errors`, the graph must raise one if the model does.
        """
        wanted = self._try(self._model, call, grad)
        if isinstance(wanted, Exception):
            if grad and self._level:
                raise _NoGradientError from wanted
            if not may_fail:
                raise CaptureError(f"{self._mode}it does not run on {what} ({_line(wanted)})") from wanted
            if not errors:
                return False
        found = self._try(self._made, call, grad)
        if isinstance(wanted, Exception):
            if isinstance(found, Exception):
                return False
            raise CaptureError(f"{self._mode}it raises an error for {what} ({_line(wanted)}), and its graph does not")
        if isinstance(found, Exception):
            if may_fail:
                return True
            raise CaptureError(f"{self._mode}its graph does not run on {what} ({_line(found)})") from found
        name = next((name for name, value in wanted.items() if not _same(value, found.get(name, "missing"))), None)
        functions = ", ".join(sorted(wanted.pop(_FUNCTIONS, set()) - found.pop(_FUNCTIONS, set())))
        # A gradient of zero says nothing about the backward of such a function: another example may show a difference.
        zeros = (name for name, x in wanted.items() if name.startswith(_GRADIENT) and x is not None and not x.any())
        if functions and (name or next(zeros, None)):
            raise CaptureError(f"it calls the custom autograd function {functions}, whose backward a graph drops")
        if not _same(wanted[_RANDOM], found[_RANDOM]):
            raise CaptureError("it draws random numbers from Python or NumPy, or seeds a generator, once in a trace")
        if name is not None:
            one, other = wanted[name], found.get(name, "missing")
            raise CaptureError(
                f"{self._mode}{name} differs for {what}: {_shown(one, other)}, in its graph {_shown(other, one)}"
            )
        return True

    def _try(self, module: nn.Module, call: Call, grad: bool) -> dict[str, Any] | Exception:
        try:
            return self._run(module, call, grad)
        except Exception as error:
            return error

    def _run(self, module: nn.Module, call: Call, grad: bool) -> dict[str, Any]:
        """Run a call. Returns everything that must be equal, by name."""
        level, leaves = self._level if grad else "", dict[str, Tensor]()
        if level:
            leaves = {
                name: value
                for name, value in module.named_parameters()
                if id(value) not in self._large and value.requires_grad
            }

        def with_gradient(path: Any, value: Any) -> Any:
            if level != "inputs" or not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            leaves[f"its input {self._input(path)}"] = value.requires_grad_()
            return value.clone()  # a forward may write into it

        seed_everything(_SEED)
        args, kwargs = pytree.tree_map_with_path(with_gradient, clone_inputs(call))
        with torch.set_grad_enabled(grad):
            # fx prints an error of a graph before it raises it.
            is_graph = isinstance(module, fx.GraphModule)
            output = nn.Module.__call__(module, *args, **kwargs) if is_graph else module(*args, **kwargs)
        outputs = {f"its output{name}": value for name, value in _flat(output)}
        inputs = pytree.tree_flatten_with_path((args, kwargs))[0]
        written = {f"its input {self._input(path)}": value for path, value in inputs}
        found = {
            _RANDOM: random_states(),
            "the type of its output": pytree.tree_structure(output),
            **outputs,
            **written,
        }
        tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        if level:
            found |= {f"requires_grad of {name}": value.requires_grad for name, value in tensors.items()}
            found |= _gradients(leaves, list(tensors.values()))
            found[_FUNCTIONS] = custom_functions(tensors.values())
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in found.items()}

    def _input(self, path: Any) -> str:
        """The name of the argument with a place in a call, and the place in the argument."""
        _, first, *rest = path
        name = first.key if hasattr(first, "key") else "".join(self._parameters[first.idx : first.idx + 1])
        return f"{name or first}{pytree.keystr(tuple(rest))}"

    def _is_same_under_autocast(self, call: Call) -> bool:
        """Whether outputs under autocast are near each other. The graph has the dtypes of a call without autocast."""
        device = next(chain(self._model.parameters(), _tensors(call).values(), [torch.empty(0)])).device.type
        with torch.autocast(device, torch.bfloat16):
            wanted, found = (self._try(each, call, False) for each in self._both)
        if isinstance(wanted, Exception) or isinstance(found, Exception):
            return isinstance(wanted, Exception)
        pairs = [(x, found.get(name)) for name, x in wanted.items() if isinstance(x, Tensor) and x.is_floating_point()]
        return all(isinstance(y, Tensor) and x.shape == y.shape and _is_near(y.double(), x.double()) for x, y in pairs)

    def _compare_other_dtype(self, call: Call) -> None:
        given = [value for value in pytree.tree_leaves(call) if isinstance(value, Tensor)]
        other = torch.float32 if any(value.dtype is torch.float64 for value in given) else torch.float64
        for each in self._both:
            each.to(other)

        def cast(value: Any) -> Any:
            return value.to(other) if isinstance(value, Tensor) and value.is_floating_point() else value

        self._compare(pytree.tree_map(cast, call), f"inputs in {other}", may_fail=True)


# --- what is compared -------------------------------------------------------------------------------------------------


def _gradients(leaves: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> dict[str, Any]:
    """The gradients of a weighted sum of all outputs; a sum of squares would be constant if an output is normalized."""
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in outputs if x.requires_grad]
    losses = [(x * torch.arange(x.numel(), device=x.device).view(x.shape).sin().to(x.dtype)).sum() for x in parts]
    found = torch.autograd.grad(losses, list(leaves.values()), allow_unused=True) if losses and leaves else ()
    given = {name: x for name, x in zip(leaves, found, strict=False) if x is None or x.numel()}
    # Compared with the largest gradient, a small one may be rounding noise.
    largest = {name: 0.0 if x is None else float(x.abs().max()) for name, x in given.items()}
    noise = 16 * max(largest.values(), default=0.0)
    made: dict[str, Any] = {}
    for name, x in given.items():
        is_noise = x is not None and largest[name] < noise * torch.finfo(x.dtype).eps
        made[f"{_GRADIENT}{name}"] = torch.zeros_like(x) if is_noise else x
    return made


def custom_functions(outputs: Iterable[Tensor]) -> set[str]:
    """The names of the custom autograd functions in the backward graph of some outputs."""
    seen, todo = set[Any](), [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    custom = (type(node) for node in seen if isinstance(node, torch.autograd.function.BackwardCFunction))
    return {cls.__name__.removesuffix("Backward") for cls in custom}


def random_states() -> list[Any]:
    """The states of the generators of torch, Python and, if it is imported, NumPy; they compare by value."""
    numpy: Any = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else ()
    of_numpy = [part.tolist() if hasattr(part, "tolist") else part for part in of_numpy]
    return [torch.get_rng_state().tolist(), random.getstate(), of_numpy]


#: Attributes that are compared otherwise, or that belong to torch.
_OTHER = frozenset(vars(nn.Module())) - {"training"}
_OPAQUE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module)
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_DEPTH = 4


def _flat(output: Any) -> list[tuple[str, Any]]:
    try:
        return [(pytree.keystr(path), value) for path, value in pytree.tree_flatten_with_path(output)[0]]
    except ValueError:  # its class does not name its fields
        return [(f" {index}", value) for index, value in enumerate(pytree.tree_leaves(output))]


def attributes(model: nn.Module) -> dict[str, Any]:
    """The attributes of all modules, with the items of containers and of objects in them, by name."""
    found: dict[str, Any] = {}
    seen = set[int]()
    for path, part in model.named_modules():
        for name, value in (vars(part) | part._buffers).items():
            if name not in _OTHER:
                _collect(found, seen, f"{path}.{name}".lstrip("."), value, _DEPTH)
    return found


def attribute_changes(before: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The names of the attributes that are not as before."""
    after = attributes(model)
    return [name for name in {**before, **after} if not _same(before.get(name, "missing"), after.get(name, "missing"))]


def _collect(found: dict[str, Any], seen: set[int], name: str, value: Any, depth: int) -> None:
    if isinstance(value, Tensor):
        found[name] = value.detach().clone()
    elif isinstance(value, _VALUES):
        found[name] = value
    else:
        found[name] = type(value)
        if depth and id(value) not in seen and not isinstance(value, _OPAQUE):
            seen.add(id(value))
            for item, each in _items(value):
                _collect(found, seen, f"{name}{item}", each, depth - 1)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield ".items", str(sorted(map(repr, value)))
    elif not type(value).__module__.startswith(("torch.", "logging")):
        yield from ((f".{key}", item) for key, item in getattr(value, "__dict__", {}).items())


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to half of the digits of their dtype, and to 2 % in half precision."""
    one, other = one.detach(), other.detach()
    limit = min(torch.finfo(one.dtype).eps ** 0.5, 0.02) if one.is_floating_point() or one.is_complex() else 0.0
    finite = other[other.isfinite()] if limit else other
    scale = float(finite.abs().max()) if limit and finite.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=limit, atol=limit * scale, equal_nan=True)


def _is_near(one: Tensor, other: Tensor) -> bool:
    one, other = one.nan_to_num(), other.nan_to_num()
    return float((one - other).norm()) <= 0.2 * float(other.norm()) + 1e-6


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, Tensor):
        return isinstance(found, Tensor) and wanted.dtype is found.dtype and is_close(found, wanted)
    if not isinstance(wanted, (*_VALUES, type, list, pytree.TreeSpec)):
        return found is None or type(found) is type(wanted)  # a graph returns None in place of a cache
    return type(wanted) is type(found) and bool(wanted == found or wanted != wanted)


def _shown(value: Any, other: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)[:100]
    if not isinstance(other, Tensor) or value.shape != other.shape or value.dtype is not other.dtype:
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)}"
    place = int((value != other).flatten().int().argmax())
    return f"{value.flatten()[place].item():.6g} at {place}" if value.numel() > 1 else f"{value.item():.6g}"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


# --- other calls ------------------------------------------------------------------------------------------------------


def _replaced(call: Call, values: Mapping[int, Any]) -> Call:
    leaves, spec = pytree.tree_flatten(call)
    made: Call = pytree.tree_unflatten([values.get(index, leaf) for index, leaf in enumerate(leaves)], spec)
    return made


def _tensors(call: Call) -> dict[int, Tensor]:
    return {index: leaf for index, leaf in enumerate(pytree.tree_leaves(call)) if isinstance(leaf, Tensor)}


def _is_mask(value: Tensor) -> bool:
    return value.dim() > 1 and (value.dtype is torch.bool or bool(((value == 0) | (value == 1)).all() and value.any()))


def _cloned(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.clone() for name, value in tensors.items()}


def _variants(call: Call, other: Call, sizes: Sizes | None) -> Iterator[tuple[frozenset[int], str, Call]]:
    """Calls in other sizes, with the indices of the sizes that are 1. Without `sizes`, also other kinds of inputs."""
    if sizes is None:
        yield from ((frozenset(), "an input of another kind", variant) for variant in _of_other_kinds(call))
    for chosen, variant in _of_other_sizes(other, _equal_sizes(call) if sizes is None else sizes):
        yield chosen, "inputs of another size", variant


def _of_other_values(call: Call) -> Iterator[Call]:
    """Calls with other values: indices in another order, other numbers, and the first third of a mask changed."""
    for by_rows in (False, True):  # a model may need the same number of end tokens in each row
        yield _replaced(call, {index: _other_value(value, by_rows) for index, value in _tensors(call).items()})
    yield _replaced(call, {index: _other_value(x, True) for index, x in _tensors(call).items() if not _is_mask(x)})


def _other_value(value: Tensor, by_rows: bool) -> Tensor:
    if _is_mask(value):
        value = value.clone()
        first = value[0, ..., : max(1, value.shape[-1] // 3)]
        first.copy_(~first if value.dtype is torch.bool else torch.zeros_like(first))
        return value
    if value.is_floating_point() or value.is_complex():
        return value.flip(tuple(range(value.dim()))) * 0.9
    return value.roll(1, 0) if by_rows and value.dim() else value.flatten().roll(1).view(value.shape)


def _of_other_kinds(call: Call) -> Iterator[Call]:
    """Calls with `None` in place of one tensor, and with a mask of another dtype."""
    for index, value in _tensors(call).items():
        yield _replaced(call, {index: None})
        if _is_mask(value):
            yield _replaced(call, {index: value.float() if value.dtype is torch.bool else value.bool()})


def _equal_sizes(call: Call) -> Sizes:
    found: dict[int, list[tuple[int, int]]] = {}
    for index, value in _tensors(call).items():
        for dimension, size in enumerate(value.shape):
            found.setdefault(size, []).append((index, dimension))
    return list(found.values())


def _of_other_sizes(call: Call, sizes: Sizes) -> Iterator[tuple[frozenset[int], Call]]:
    """Calls in other sizes, with the indices of the sizes that are 1.

    torch.export assumes that a size is at least 2, and drops what follows from that: so 1 beside the smallest others.
    """
    every = range(len(sizes))
    for index in every:
        yield frozenset([index]), _resized(call, sizes, {index: 1})
        if len(sizes) > 1:
            yield frozenset([index]), _resized(call, sizes, {**dict.fromkeys(every, 2), index: 1})
    if len(sizes) > 1:
        yield frozenset(every), _resized(call, sizes, dict.fromkeys(every, 1))
    for size in (2, 3):
        yield frozenset(), _resized(call, sizes, dict.fromkeys(every, size))
    for index in every:
        yield frozenset(), _resized(call, sizes, {index: -1})


def _resized(call: Call, sizes: Sizes, wanted: Mapping[int, int]) -> Call:
    """The call with the first items of some sizes; for -1, with its first item again at the end."""
    tensors = _tensors(call)
    for which, size in wanted.items():
        for index, dimension in sizes[which]:
            x = tensors[index]
            part = x.narrow(dimension, 0, min(abs(size), x.shape[dimension]))
            tensors[index] = torch.cat([x, part], dimension) if size < 0 else part
    return _replaced(call, tensors)
