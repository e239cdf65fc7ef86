"""Compare a graph with its model: both run the same calls, on copies, and must do the same. Every graph passes here.

    compare(model, graph, call)

The calls, in each mode: the example with gradients; other values under `no_grad`; the example again with other
parameters; masks with padding, `None` and other dtypes; autocast; other sizes. Equal must be: the outputs with their
types, the gradients of inputs and parameters, written inputs, random numbers, and what the calls change in the modules.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import pytree
from hra_fx.errors import CaptureError
from hra_fx.model.example_inputs import Call, clone_inputs, preserve_rng_state, seed_everything
from hra_fx.tracing.observed import (
    attributes,
    custom_functions,
    gradients,
    is_near,
    is_same,
    named_leaves,
    random_states,
    shown,
)
from hra_fx.tracing.other_calls import Sizes, equal_sizes, of_other_kinds, of_other_sizes, of_other_values, tensors_of

_SEED = 20240517
#: Larger parameters share memory with the model: their values stay, and their gradients are not compared.
_LARGE = 1 << 18
#: What gets gradients; the next one, if the model cannot be run with it.
_LEVELS = ("inputs", "parameters", "")
_RANDOM, _FUNCTIONS, _GRADIENT = "the random generators", "custom autograd functions", "the gradient of "


class Limits(NamedTuple):
    """For which calls a graph is right: sets of indices of sizes that must not all be 1, and whether under autocast."""

    not_one: list[frozenset[int]]
    under_autocast: bool


def compare(
    model: nn.Module, made: nn.Module, call: Call, sizes: Sizes | None = None, *, with_gradients: bool = True
) -> Limits:
    """Compare a graph with its model for a call that both can run, and for others like it. Neither is changed.

    `sizes` are those that may change. Without them, the graph must be right for all sizes, masks and dtypes that the
    model allows, and under autocast.

    Raises:
        CaptureError: they differ. It names what differs, and both values.
    """
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        return Limits([], True)
    with preserve_rng_state(), torch.inference_mode(False):
        for level in _LEVELS if with_gradients else ("",):
            try:
                return _Comparison(model, made, level).run(call, sizes)
            except _NoGradientError:
                continue
    raise AssertionError  # the last level does not need gradients


def copied(model: nn.Module, keep: Iterable[Tensor]) -> Any:
    """Copy a model. The tensors in `keep` are shared with the copy."""
    # Only leaves of autograd can be copied; a forward may have left other tensors in attributes.
    held = (value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor))
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in held if value.grad_fn is not None}
    try:
        return copy.deepcopy(model, memo | {id(value): value for value in keep})
    except Exception as error:
        raise CaptureError(f"it cannot be copied ({_line(error)})") from error


def with_shared_tensors(model: nn.Module) -> Any:
    """Copy the modules of a model, with its own parameters and buffers, for a forward that may change the modules."""
    return copied(model, chain(model.parameters(), model.buffers()))


class _NoGradientError(Exception):
    """The model cannot be run with gradients of this level."""


class _Comparison:
    """Copies of a model and its graph, which run the same calls in turns."""

    def __init__(self, model: nn.Module, made: nn.Module, level: str) -> None:
        large = [value for value in model.parameters() if value.numel() > _LARGE or type(value) is not nn.Parameter]
        self._model, self._made = self._both = copied(model, large), copied(made, large)
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._large = set(map(id, large))
        self._level, self._mode = level, ""
        for value in chain(*map(self._small, self._both)):
            value.requires_grad_(bool(level))
        keys = [set(each.state_dict()) for each in (model, made, self._made)]
        if odd := sorted(set.union(*keys) - set.intersection(*keys)):
            raise CaptureError(f"{odd[0]} is in the state_dict of only one of the model, its graph and a copy of it")

    def run(self, call: Call, sizes: Sizes | None) -> Limits:
        """Compare in both modes, and first in a mixed mode."""
        limits = Limits([], True)
        is_mixed = len({part.training for part in self._model.modules()}) > 1
        for mode in (None, False, True)[not is_mixed :]:
            self._mode = "" if mode is None else f"in {'train' if mode else 'eval'} mode, "
            self._set_mode(mode)
            other = self._compare_two_calls(call)
            self._change_parameters()
            self._set_mode(mode)
            self._compare(call, "the example with other parameters")
            if mode is False:
                limits = limits._replace(under_autocast=self._is_same_under_autocast(call))
                if sizes is None and not limits.under_autocast:
                    raise CaptureError(f"{self._mode}its graph differs under autocast")
            limits = self._compare_variants(call, other, sizes, limits)
        if sizes is None:
            self._compare_in_another_dtype(call)
        return limits

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
        others = (other for other in of_other_values(call) if self._compare(other, "other values", may_fail=True))
        if (other := next(others, None)) is None:
            self._compare(call, "the example again")
        second = [attributes(each) for each in self._both]
        buffers = dict(self._model.named_buffers())
        for name in first[0] | second[0]:
            start = before.get(name)
            one, two, wanted, found = (part.get(name, start) for part in (*first, *second))
            # What only the first call changes, such as a cache, has done no harm.
            is_state = (
                name in buffers or name.endswith("training") or not (is_same(one, wanted) and is_same(two, found))
            )
            if is_state and not is_same(wanted, found):
                values = f"{shown(wanted, found)}, in its graph {shown(found, wanted)}"
                raise CaptureError(f"{self._mode}after two calls, {name} is {values}")
        return other or call

    def _compare_variants(self, call: Call, other: Call, sizes: Sizes | None, limits: Limits) -> Limits:
        """Compare calls for which the model or its graph may raise an error, and so may write other buffers."""
        buffers = [(part._buffers, _cloned(part._buffers)) for each in self._both for part in each.modules()]
        not_one, none = limits.not_one, frozenset[int]()
        kinds = () if sizes is not None else ((none, variant) for variant in of_other_kinds(call))
        for chosen, variant in chain(kinds, of_other_sizes(other, equal_sizes(call) if sizes is None else sizes)):
            # Without a size of 1, one mode is enough.
            if any(known <= chosen for known in not_one) or not (chosen or self._mode.startswith("in eval")):
                continue
            try:
                self._compare(variant, "an input of another kind or size", may_fail=True, errors=sizes is not None)
            except CaptureError:
                if sizes is None or not chosen:
                    raise
                not_one = [*not_one, chosen]
            for now, before in buffers:
                now.update(_cloned(before))
        return limits._replace(not_one=not_one)

    def _is_same_under_autocast(self, call: Call) -> bool:
        """Whether outputs under autocast are near each other. A graph has the dtypes of a call without autocast."""
        device = next(chain(self._model.parameters(), tensors_of(call).values(), [torch.empty(0)])).device.type
        with torch.autocast(device, torch.bfloat16):
            wanted, found = (self._try(each, call, False) for each in self._both)
        if isinstance(wanted, Exception) or isinstance(found, Exception):
            return isinstance(wanted, Exception)
        return all(is_near(value, found.get(name)) for name, value in wanted.items())

    def _compare_in_another_dtype(self, call: Call) -> None:
        kinds = {value.dtype for value in chain(self._model.parameters(), tensors_of(call).values())}
        other = torch.float32 if torch.float64 in kinds else torch.float64

        def cast(value: Any) -> Any:
            return value.to(other) if isinstance(value, Tensor) and value.is_floating_point() else value

        for each in self._both:
            each._apply(cast)
        self._compare(pytree.tree_map(cast, call), f"inputs in {other}", may_fail=True)

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
            if errors and not isinstance(self._try(self._made, call, grad), Exception):
                raise CaptureError(f"{self._mode}its graph raises no error for {what}, and it does: {_line(wanted)}")
            return False
        found = self._try(self._made, call, grad)
        if isinstance(found, Exception):
            if may_fail:
                return True
            raise CaptureError(f"{self._mode}its graph does not run on {what} ({_line(found)})") from found
        if difference := _difference(wanted, found):
            raise CaptureError(f"{self._mode}{difference[0]} differs for {what}: {difference[1]}")
        return True

    def _try(self, module: nn.Module, call: Call, grad: bool) -> dict[str, Any] | Exception:
        try:
            return self._run(module, call, grad)
        except Exception as error:
            return error

    def _run(self, module: nn.Module, call: Call, grad: bool) -> dict[str, Any]:
        """Run a call. Returns everything that must be equal, by name."""
        level = self._level if grad else ""
        leaves: dict[str, Tensor] = {}
        if level:
            leaves = {name: x for name, x in module.named_parameters() if x.requires_grad and id(x) not in self._large}

        def with_gradient(path: Any, value: Any) -> Any:
            if level != "inputs" or not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            leaves[self._input(path)] = value.requires_grad_()
            return value.clone()  # a forward may write into it

        seed_everything(_SEED)
        args, kwargs = pytree.tree_map_with_path(with_gradient, clone_inputs(call))
        with torch.set_grad_enabled(grad):
            # fx would print an error of a graph before it raises it.
            is_graph = isinstance(module, fx.GraphModule)
            output = nn.Module.__call__(module, *args, **kwargs) if is_graph else module(*args, **kwargs)
        found = {_RANDOM: random_states(), "the type of its output": pytree.tree_structure(output)}
        outputs = {f"its output{name}": value for name, value in named_leaves(output).items()}
        found |= outputs | {self._input(path): x for path, x in pytree.tree_flatten_with_path((args, kwargs))[0]}
        if level:
            tensors = [value for value in outputs.values() if isinstance(value, Tensor)]
            found |= {f"requires_grad of output {index}": value.requires_grad for index, value in enumerate(tensors)}
            found |= {f"{_GRADIENT}{name}": value for name, value in gradients(leaves, tensors).items()}
            found[_FUNCTIONS] = custom_functions(tensors)
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in found.items()}

    def _input(self, path: Any) -> str:
        """The name of an argument, and a place in it."""
        _, first, *rest = path
        name = first.key if hasattr(first, "key") else "".join(self._parameters[first.idx : first.idx + 1])
        return f"its input {name or first}{pytree.keystr(tuple(rest))}"


def _difference(wanted: dict[str, Any], found: dict[str, Any]) -> tuple[str, str] | None:
    """The name of the first thing that differs, and both values."""
    custom = ", ".join(sorted(wanted.pop(_FUNCTIONS, set()) - found.pop(_FUNCTIONS, set())))
    if not is_same(wanted[_RANDOM], found[_RANDOM]):
        raise CaptureError("it draws random numbers from Python or NumPy, or seeds a generator, once in a trace")
    name = next((name for name, value in wanted.items() if not is_same(value, found.get(name, "none"))), None)
    # A gradient of zero says nothing about the backward of such a function: another example may show a difference.
    if custom and (
        name or any(key.startswith(_GRADIENT) and x is not None and not x.any() for key, x in wanted.items())
    ):
        raise CaptureError(f"it calls the custom autograd function {custom}, whose backward a graph drops")
    if name is None:
        return None
    one, other = wanted[name], found.get(name, "none")
    return name, f"{shown(one, other)}, in its graph {shown(other, one)}"


def _cloned(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.clone() for name, value in tensors.items()}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
