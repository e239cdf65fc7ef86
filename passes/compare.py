"""Compare a graph with its model: both run the same calls, on copies, and must do the same.

    compare(model, graph, call)

torch.fx and torch.export drop what they cannot record, often without an error. So every graph of a model that this
process can run is compared, if there is an example call: with random adapters for the example, and without them.

The calls, in each mode: the example with gradients; other values under `no_grad`; other parameters; parts in the other
mode; autocast and inference mode; other masks, kinds, dtypes and strides of inputs; other sizes. Equal must be: the
outputs with their types, the gradients of inputs and parameters, written inputs, random numbers, and what the calls
change in the modules. What remains unseen is listed in docs/limitations.md.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hra_fx.compat import FakeTensor, has_own_hooks, tensor_versions
from hra_fx.errors import CaptureError
from hra_fx.example_inputs import Call, preserve_rng_state, seed_everything
from hra_fx.layers.readers import needs_parameters
from hra_fx.layers.sharding import is_dtensor
from hra_fx.layers.target import REFLECTION
from hra_fx.passes.observed import attributes, difference, is_near, is_same, observe, shown
from hra_fx.passes.other_calls import (
    Sizes,
    equal_sizes,
    not_contiguous,
    of_other_dtypes,
    of_other_kinds,
    of_other_sizes,
    of_size_one,
    tensors_of,
    with_other_values,
)

_SEED = 20240517
#: Larger parameters share memory with the model: their values stay, and their gradients are not compared.
_LARGE = 1 << 18

#: Adapts a model or a graph, in place.
Attach: TypeAlias = Callable[[nn.Module], object]


@dataclass
class Limits:
    """For which calls a graph is right.

    Attributes:
        not_one: sets of indices of sizes that must not all be 1.
        same_dtype: indices of the flat inputs that must have the dtype of the example.
        contiguous: indices of the flat inputs that must be contiguous.
        under_autocast: whether it is right under autocast.
    """

    not_one: list[frozenset[int]] = field(default_factory=list)
    same_dtype: set[int] = field(default_factory=set)
    contiguous: set[int] = field(default_factory=set)
    under_autocast: bool = True


def compare(
    model: nn.Module, made: nn.Module, call: Call, sizes: Sizes | None = None, attach: Attach | None = None
) -> Limits:
    """Compare a graph with its model for a call that both can run, and for others like it. Neither is changed.

    `sizes` are those that may change. Without them, the graph must be right without limits. A `CaptureError` names what
    differs, and both values. `attach` adds the adapters that both will have.
    """
    if _cannot_run(model):
        return Limits()
    limits = _compared(model, made, None, lambda comparison: comparison.run(call, sizes))
    if attach is not None:
        _compared(model, made, attach, lambda comparison: comparison.run_adapted(call))
    return limits


def compare_call(model: nn.Module, made: nn.Module, call: Call, *, training: bool = False) -> None:
    """Compare a graph with its model for one call, in one mode; see `compare`."""
    if not _cannot_run(model):
        _compared(model, made, None, lambda comparison: comparison.run_once(call, training=training))


def does_the_same_in_train_mode(model: nn.Module, made: nn.Module, call: Call) -> bool:
    """Whether a graph that was captured in eval mode is right for a call in train mode, too."""
    if _cannot_run(model):
        return False
    with suppress(CaptureError):
        compare_call(model, made, call, training=True)
        return True
    return False


def _compared(model: nn.Module, made: nn.Module, attach: Attach | None, run: Callable[[_Comparison], Limits]) -> Limits:
    """Run a comparison with gradients; without them, if the model does not have a backward pass."""
    flags = {value: value.requires_grad for value in model.parameters()}
    try:
        with preserve_rng_state(), torch.inference_mode(False):
            try:
                return run(_Comparison(model, made, attach, has_grad=True))
            except _NoGradientError:
                return run(_Comparison(model, made, attach, has_grad=False))
    finally:
        for value, flag in flags.items():
            value.requires_grad_(flag)


def _cannot_run(model: nn.Module) -> bool:
    """Whether this process cannot run a model: its tensors have no data, or are shards that all processes need."""
    tensors = (*model.parameters(), *model.buffers())
    return any(tensor.is_meta or is_dtensor(tensor) or isinstance(tensor, FakeTensor) for tensor in tensors)


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
    if any(map(is_dtensor, model.parameters())):  # FSDP2 refuses deepcopy
        return _cloned_tree(model, {})
    return copied(model, chain(model.parameters(), model.buffers()))


def _cloned_tree(module: nn.Module, known: dict[nn.Module, Any]) -> Any:
    if module not in known:
        made = known[module] = object.__new__(type(module))
        vars(made).update(vars(module))
        for kind in ("_parameters", "_buffers"):
            vars(made)[kind] = dict(vars(module)[kind])
        vars(made)["_modules"] = {
            name: None if child is None else _cloned_tree(child, known) for name, child in module._modules.items()
        }
    return known[module]


class ExampleError(CaptureError):
    """The model does not run on the example."""


class _NoGradientError(Exception):
    """The model cannot be run with gradients."""


class _Comparison:
    """Copies of a model and its graph, which run the same calls in turns."""

    def __init__(self, model: nn.Module, made: nn.Module, attach: Attach | None, *, has_grad: bool) -> None:
        writes = any(needs_parameters(type(part)) for part in model.modules())
        limit = math.inf if writes else _LARGE
        both = dict.fromkeys(chain(model.parameters(), made.parameters()))
        # What is behind a large layer of zeros would not be compared.
        large = [x for x in both if type(x) is not nn.Parameter or (x.numel() > limit and bool(x.any()))]
        self._model, self._made = self._both = copied(model, large), copied(made, large)
        self._keys = [set(each.state_dict()) for each in (model, made, self._made)]
        self._names = list(inspect.signature(model.forward).parameters)
        self._shared, self._large = large, set(map(id, large))
        self._has_grad, self._mode, self._versions = has_grad, "", tensor_versions(large)
        self._limits, self._one = Limits(), dict[frozenset[int], bool]()
        self._flags: dict[nn.Parameter, bool] = {}
        if attach is not None:
            self._adapt(attach)
        for value in chain(*map(self._small, self._both)):
            value.requires_grad_(has_grad)

    def _adapt(self, attach: Attach) -> None:
        for each in self._both:
            seed_everything(_SEED)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attach(each)
            self._flags |= {value: value.requires_grad for value in each.parameters()}
            for path, part in each.named_modules():
                for value in part.parameters(recurse=False) if path.rpartition(".")[2] == REFLECTION else ():
                    value.data.copy_(torch.randn(value.shape))

    def run(self, call: Call, sizes: Sizes | None) -> Limits:
        """Compare in both modes, and first as it is, if the parts of the model have different modes."""
        if odd := sorted(set.union(*self._keys) - set.intersection(*self._keys)):
            raise CaptureError(f"{odd[0]} is in the state_dict of only one of the model, its graph and a copy of it")
        if len({part.training for part in self._model.modules()}) > 1:
            self._compare(call, "the example in the modes of its parts", grad=True, may_fail=True)
        for mode in (False, True):
            self._set_mode(mode)
            other = self._compare_two_calls(call)
            self._change_parameters()
            self._set_mode(mode)
            self._compare(call, "the example with other parameters")
            buffers = [(part._buffers, _cloned(part._buffers)) for each in self._both for part in each.modules()]
            if not mode:
                self._compare_under_autocast(call, sizes)
            for kind, step in self._variants(call, other, sizes, is_eval=not mode):
                try:
                    step()
                except CaptureError:
                    if sizes is None or kind is None:
                        raise
                    kind()
                # The model or its graph may raise an error, and so may write other buffers.
                for now, before in buffers:
                    now.update(_cloned(before))
        self._set_mode(False)
        with torch.inference_mode():  # the last call, because its tensors may stay in a cache
            self._compare(call, "the example in inference mode", may_fail=True)
        ran = [ones for ones, has_run in self._one.items() if has_run]
        # Sizes that must be equal are 1 together.
        unseen = [ones for ones in self._one if not any(ones <= others for others in ran)]
        self._limits.not_one += unseen if sizes is not None else []
        return self._limits

    def run_adapted(self, call: Call) -> Limits:
        """Compare in eval mode, where rounding stays small; with all gradients, and with those that are trained."""
        self._set_mode(False)
        self._compare(call, "the example with adapters", grad=True)
        for value, flag in self._flags.items():
            value.requires_grad_(flag)
        self._compare(call, "the example with frozen parameters", grad=True, may_fail=True)
        return self._limits

    def run_once(self, call: Call, *, training: bool) -> Limits:
        """Compare one call in one mode."""
        self._set_mode(training)
        self._compare(call, "the example", grad=training)
        return self._limits

    def _small(self, module: nn.Module) -> list[nn.Parameter]:
        return [value for value in module.parameters() if id(value) not in self._large and value.is_floating_point()]

    def _set_mode(self, mode: bool) -> None:
        self._mode = f"in {'train' if mode else 'eval'} mode, "
        for each in self._both:
            each.train(not mode)  # what a model does when its mode changes, such as clearing a cache
            each.train(mode)
        modes = [{path: part.training for path, part in each.named_modules()} for each in self._both]
        if odd := next((path for path, training in modes[0].items() if modes[1].get(path, training) != training), None):
            raise CaptureError(f"{odd} has another mode than in its graph. An overridden train() is lost in a graph")

    def _change_parameters(self) -> None:
        for each in self._both:
            seed_everything(_SEED)
            for value in self._small(each):
                spread = 0.1 * float(value.detach().float().square().mean().sqrt().nan_to_num()) or 0.1
                value.data += spread * torch.randn(value.shape).to(value)

    def _compare_two_calls(self, call: Call) -> Call:
        """Compare the example and other values. Returns these values; the example, if the model takes no others."""
        before = attributes(self._model)
        self._compare(call, "the example", grad=True)
        first = [attributes(each) for each in self._both]
        others = (other for other in with_other_values(call) if self._compare(other, "other values", may_fail=True))
        if (other := next(others, None)) is None:
            self._compare(call, "the example again")
        second = [attributes(each) for each in self._both]
        kept = self._model.state_dict()
        for name in first[0] | second[0]:
            one, two, wanted, found = (part.get(name, before.get(name)) for part in (*first, *second))
            # What only the first call changes, such as a cache, has done no harm.
            is_changed = not (is_same(one, wanted) and is_same(two, found))
            if (is_changed or name in kept or name.endswith("training")) and not is_same(wanted, found):
                values = f"{shown(wanted, found)}, in its graph {shown(found, wanted)}"
                raise CaptureError(f"{self._mode}after two calls, {name} is {values}")
        return other or call

    def _variants(
        self, call: Call, other: Call, sizes: Sizes | None, *, is_eval: bool
    ) -> Iterator[tuple[Callable[[], object] | None, Callable[[], object]]]:
        """What to compare, as functions, each after a function that notes that its inputs must be refused."""
        limits, run = self._limits, partial(self._compare, may_fail=True, errors=sizes is not None)
        if is_eval:
            for variant in of_other_kinds(call) if sizes is None else ():
                yield None, partial(run, variant, "an input of another kind")
            for index, variant in of_other_dtypes(call):
                yield partial(limits.same_dtype.add, index), partial(run, variant, "an input of another dtype")
            for index, variant in not_contiguous(call):
                yield partial(limits.contiguous.add, index), partial(run, variant, "an input of other strides")
        for variant in of_other_sizes(other, equal_sizes(call) if sizes is None else sizes) if is_eval else ():
            yield None, partial(run, variant, "an input of another size")
        seen = set[frozenset[int]]()
        for ones, tries in of_size_one(other, equal_sizes(call) if sizes is None else sizes):
            is_new = ones not in seen
            seen.add(ones)
            if (is_eval or is_new) and not any(known <= ones for known in limits.not_one):
                yield (
                    partial(limits.not_one.append, ones),
                    partial(self._compare_first, ones, tries, errors=sizes is not None),
                )

    def _compare_first(self, ones: frozenset[int], tries: Iterable[Call], *, errors: bool) -> None:
        """Compare the first call that the model can run. For the others, the graph must raise an error too."""
        run = partial(self._compare, what="an input of size 1", may_fail=True, errors=errors)
        self._one[ones] = any(map(run, tries)) or self._one.get(ones, False)

    def _compare_under_autocast(self, call: Call, sizes: Sizes | None) -> None:
        # A graph has the dtypes of a call without autocast.
        tensors = (*self._model.parameters(), *tensors_of(call).values(), torch.empty(0))
        with torch.autocast(tensors[0].device.type, torch.bfloat16):
            wanted, found = (self._try(each, call, False) for each in self._both)
        if isinstance(wanted, Exception):
            return
        near = isinstance(found, dict) and all(is_near(value, found.get(name)) for name, value in wanted.items())
        self._limits.under_autocast = near
        if not near and sizes is None:
            raise CaptureError(f"{self._mode}its graph differs under autocast")

    def _compare(
        self, call: Call, what: str, *, grad: bool = False, may_fail: bool = False, errors: bool = False
    ) -> bool:
        """Run a call with both, and raise an error if they differ. Returns whether the model could run it.

        `may_fail`: either may raise an error instead; with `errors`, the graph must raise one if the model does.
        """
        wanted = self._try(self._model, call, grad)
        if isinstance(wanted, Exception):
            if grad and self._has_grad and not may_fail:
                raise _NoGradientError from wanted
            if not may_fail:
                raise ExampleError(f"{self._mode}it does not run on {what} ({_line(wanted)})") from wanted
            if errors and not isinstance(self._try(self._made, call, grad), Exception):
                raise CaptureError(f"{self._mode}its graph raises no error for {what}, and it does: {_line(wanted)}")
            return False
        found = self._try(self._made, call, grad)
        if isinstance(found, Exception):
            if may_fail:
                return True
            raise CaptureError(f"{self._mode}its graph does not run on {what} ({_line(found)})") from found
        if differs := difference(wanted, found):
            hooked = [path or "the model" for path, part in self._model.named_modules() if has_own_hooks(part)]
            hint = f". Hooks of {', '.join(hooked[:3])} may be the reason" if hooked else ""
            raise CaptureError(f"{self._mode}{differs[0]} differs for {what}: {differs[1]}{hint}")
        return True

    def _try(self, module: nn.Module, call: Call, grad: bool) -> dict[str, Any] | Exception:
        seed_everything(_SEED)
        parameters = {name: value for name, value in module.named_parameters() if id(value) not in self._large}
        found: dict[str, Any] | Exception
        try:
            with torch.set_grad_enabled(grad):
                found = observe(module, call, self._names, parameters, has_grad=grad and self._has_grad)
        except Exception as error:
            found = error
        if tensor_versions(self._shared) != self._versions:
            raise CaptureError("its forward writes into parameters, now also into those of the model. Load it again")
        return found


def _cloned(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.clone() for name, value in tensors.items()}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:400]}"
