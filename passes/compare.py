"""Compare a graph with its model: copies of both run the same calls, and must do the same.

    limits = compare(model, graph, call)

torch.fx and torch.export drop what they cannot record, often without an error. So every graph of a model that this
process can run is compared, if there is an example call.

The parameters of the copies are changed a little first, so that a graph with their values is found out. The calls, in
each mode: the example, also with adapters, with gradients; other values under `no_grad`, sizes of 1, one tensor for
several inputs; in eval mode also autocast, inference mode, other strides, sizes and kinds of inputs; in train mode also
layers in eval mode. Equal must be: the outputs and their types, the gradients of inputs and parameters, written inputs
and buffers, and random numbers. Nothing else in the modules may change. What remains unseen is listed in
docs/limitations.md.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import FakeTensor, tensor_versions
from hra_fx.errors import CaptureError
from hra_fx.example_inputs import Call, preserve_rng_state, seed_everything
from hra_fx.layers.sharding import is_dtensor
from hra_fx.passes.nodes import attribute
from hra_fx.passes.observed import attributes, changed_attribute, difference, observe
from hra_fx.passes.other_calls import (
    Sizes,
    equal_sizes,
    of_other_kinds,
    of_other_layouts,
    of_other_sizes,
    of_size_one,
    reversed_keys,
    with_one_object,
    with_other_order,
    with_other_values,
)

_SEED = 20240517
#: Larger parameters share memory with the model: their values stay, and their gradients are not compared.
_LARGE = 1 << 18

#: What in a model may be the reason of a difference, for each call.
_REASONS = {
    "the example": "its forward asks for the class of a value (isinstance), changes the mode of a part, or fills a "
    "buffer in its first call, so call the model once before",
    "the example with adapters": "its forward reads the parameters, the state_dict or the class of a layer",
    "other values": "its forward branches on values, or keeps a value of an earlier call",
    "an input of size 1": "its forward branches on a size",
    "an input of another size": "its forward branches on a size",
    "an input of another kind": "its forward asks whether an input is None, a number or a mask",
    "one tensor as several inputs": "its forward asks whether two inputs are one object",
}

#: Adapts a model or a graph, in place.
Attach: TypeAlias = Callable[[nn.Module], object]


@dataclass
class Limits:
    """For which calls a graph is right.

    Attributes:
        not_one: sets of indices of sizes that must not all be 1.
        layouts: conditions on how its inputs lie in memory.
        ordered: whether the keys of dictionaries must have their order.
        autocast: whether it is right under autocast.
        one_mode: whether all its parts must have the same mode, also those that it calls.
    """

    not_one: list[frozenset[int]] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    ordered: bool = False
    autocast: bool = True
    one_mode: bool = False


class ExampleError(CaptureError):
    """The model does not run on the example."""


def compare(
    model: nn.Module, made: fx.GraphModule, call: Call, sizes: Sizes | None = None, attach: Attach | None = None
) -> Limits:
    """Compare a graph with its model for a call that both can run, and for others like it. Neither is changed.

    `sizes` are those that may change. Without them, the graph must be right without limits. A `CaptureError` names what
    differs, and both values. `attach` adds adapters to a model or a graph: then both are also compared with them.
    """
    with _compared(model, made) as comparison:
        limits = comparison.run(call, sizes) if comparison else Limits()
    if attach is not None:
        with _compared(model, made, attach) as comparison:
            for training in (False, True):
                if comparison:
                    comparison.set_mode(training)
                    comparison.compare(call, "the example with adapters", grad=True)
    return limits


def compare_call(model: nn.Module, made: fx.GraphModule, call: Call, *, training: bool = False) -> None:
    """Compare a graph with its model for one call, in one mode; see `compare`."""
    with _compared(model, made) as comparison:
        if comparison:
            comparison.set_mode(training)
            comparison.compare(call, "the example", grad=training)


@contextmanager
def _compared(model: nn.Module, made: fx.GraphModule, attach: Attach | None = None) -> Iterator[_Comparison | None]:
    """A comparison, after which everything is as before; `None` if tensors of the model have no data, or are shards."""
    tensors = chain(model.parameters(), model.buffers())
    if any(value.is_meta or isinstance(value, FakeTensor) or is_dtensor(value) for value in tensors):
        yield None
        return
    flags = {value: value.requires_grad for value in model.parameters()}
    try:
        with preserve_rng_state(), torch.inference_mode(False):
            yield _Comparison(model, made, attach)
    finally:
        for value, flag in flags.items():
            value.requires_grad_(flag)


def copied(model: nn.Module, keep: Iterable[Tensor] | None = None) -> Any:
    """Copy a model. The tensors in `keep`, by default all parameters and buffers, are shared with the copy."""
    if any(map(is_dtensor, model.parameters())):  # FSDP2 refuses deepcopy
        return _cloned_tree(model, {})
    keep = chain(model.parameters(), model.buffers()) if keep is None else keep
    # Only leaves of autograd can be copied; a forward may have left other tensors in attributes.
    held = (value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor))
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in held if value.grad_fn is not None}
    try:
        return copy.deepcopy(model, memo | {id(value): value for value in keep})
    except Exception as error:
        raise CaptureError(f"it cannot be copied ({_line(error)})") from error


def _cloned_tree(module: nn.Module, known: dict[nn.Module, Any]) -> Any:
    """Copy modules with their own parameters and buffers."""
    if module not in known:
        made = known[module] = object.__new__(type(module))
        vars(made).update({name: dict(x) if isinstance(x, dict) else x for name, x in vars(module).items()})
        children = {name: child and _cloned_tree(child, known) for name, child in module._modules.items()}
        vars(made)["_modules"] = children
    return known[module]


class _Comparison:
    """Copies of a model and its graph, with other parameters, and adapters if asked for. Both run the same calls."""

    def __init__(self, model: nn.Module, made: fx.GraphModule, attach: Attach | None) -> None:
        both = dict.fromkeys(chain(model.parameters(), made.parameters()))
        # What is behind a large layer of zeros would not be compared.
        large = [x for x in both if type(x) is not nn.Parameter or (x.numel() > _LARGE and bool(x.any()))]
        self._both = self._model, self._made = copied(model, large), copied(made, large)
        self._large, self._versions, self._mode = large, tensor_versions(large), ""
        for each in self._both:
            seed_everything(_SEED)
            small = self._small(each)
            for value in small.values():
                value.requires_grad_(value.is_floating_point())
            if attach is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    attach(each)
            for value in self._small(each).values():
                if value.is_floating_point():
                    spread = 0.1 * float(value.detach().float().square().mean().sqrt().nan_to_num()) or 0.1
                    value.data += spread * torch.randn(value.shape).to(value)
        self.set_mode(False)

    def _small(self, module: nn.Module) -> dict[str, nn.Parameter]:
        large = set(map(id, self._large))
        return {name: value for name, value in module.named_parameters() if id(value) not in large}

    def set_mode(self, training: bool) -> None:
        """Set the mode of both."""
        self._mode = f"in {'train' if training else 'eval'} mode, "
        for each in self._both:
            each.train(not training)  # what a model does when its mode changes, such as clearing a cache
            each.train(training)

    def run(self, call: Call, sizes: Sizes | None) -> Limits:
        """Compare in both modes."""
        limits, self._has_limits = Limits(), sizes is not None
        sizes = equal_sizes(call) if sizes is None else sizes
        device = next((value.device for value in self._model.parameters()), torch.device("cpu"))
        for training in (False, True):
            self.set_mode(training)
            other = self._compare_two_calls(call)
            self._compare_size_one(other, sizes, limits, training=training)
            for variant in with_one_object(call):
                self.compare(variant, "one tensor as several inputs", may_fail=True)
            limits.ordered |= self._is_right(with_other_order(call), "keys in another order") is False
            self.compare((call[0], reversed_keys(call[1])), "keywords in another order", may_fail=True)
            with torch.autocast(device.type, torch.bfloat16):
                limits.autocast &= self._is_right([call], "the example under autocast") is not False
        limits.one_mode = self._reads_called_flags(call)
        self.set_mode(False)
        for variant in of_other_sizes(other, sizes):
            self.compare(variant, "an input of another size", may_fail=True)
        for variant in of_other_kinds(call) if not self._has_limits else ():
            self.compare(variant, "an input of another kind", may_fail=True)
        for layout, variant in of_other_layouts(call):
            if self._is_right([variant], "inputs of another memory layout") is False:
                limits.layouts.append(layout)
        with torch.inference_mode():  # the last call, because its tensors may stay in a cache
            self.compare(call, "the example in inference mode", may_fail=True)
        return limits

    def _reads_called_flags(self, call: Call) -> bool:
        """Whether the graph is wrong in train mode if the parts that it calls are in eval mode."""
        self.set_mode(True)
        called = [node.target for node in self._made.graph.find_nodes(op="call_module")]
        for part in (attribute(each, path) for path in called for each in self._both if attribute(self._model, path)):
            part.eval()
        return self._is_right([call], "the example with layers in eval mode") is False

    def _compare_two_calls(self, call: Call) -> Call:
        """Compare the example and other values. Returns these values; the example, if the model takes no others."""
        self.compare(call, "the example", grad=True)
        before = attributes(self._model)  # what only the first call changes, such as a cache, has done no harm
        others = (other for other in with_other_values(call) if self.compare(other, "other values", may_fail=True))
        if (other := next(others, None)) is None:
            self.compare(call, "the example again")
        if changed := changed_attribute(before, self._model):
            raise CaptureError(f"{self._mode}its forward changes {changed}, which a graph drops")
        return other or call

    def _compare_size_one(self, call: Call, sizes: Sizes, limits: Limits, *, training: bool) -> None:
        seen, unseen = list[frozenset[int]](), list[frozenset[int]]()
        for ones, *tries in of_size_one(call, sizes):
            if any(known <= ones for known in limits.not_one):
                continue
            # The calls of a list are tried until the model can run one.
            ran = [self._is_right(calls, "an input of size 1") for calls in (tries[:1] if training else tries)]
            if False in ran:
                limits.not_one.append(ones)
            else:
                (seen if True in ran else unseen).append(ones)
        if self._has_limits and not training:  # sizes that must be equal are 1 together
            limits.not_one += [ones for ones in unseen if not any(ones <= others for others in seen)]

    def _is_right(self, calls: Iterable[Call], what: str) -> bool | None:
        """Whether the graph is right for the first call that the model can run; `None` if it can run none of them.

        If the graph must be right without limits, an error says what differs.
        """
        try:
            return any(self.compare(call, what, may_fail=True) for call in calls) or None
        except CaptureError:
            if not self._has_limits:
                raise
            return False

    def compare(self, call: Call, what: str, *, grad: bool = False, may_fail: bool = False) -> bool:
        """Run a call with both, and raise an error if they differ. Returns whether the model could run it.

        If it has no backward pass, they are compared without gradients. `may_fail`: either may raise an error instead.
        """
        wanted = self._try(self._model, call, grad)
        if isinstance(wanted, Exception):
            if grad:
                return self.compare(call, what, may_fail=may_fail)
            if not may_fail:
                raise ExampleError(f"{self._mode}it does not run on {what} ({_line(wanted)})") from wanted
            return False
        found = self._try(self._made, call, grad)
        if isinstance(found, Exception):
            if may_fail:
                return True
            raise CaptureError(f"{self._mode}its graph does not run on {what} ({_line(found)})") from found
        if differs := difference(wanted, found):
            reason = _REASONS.get(what, "its forward reads something that a graph does not have")
            raise CaptureError(f"{self._mode}{differs[0]} differs for {what}: {differs[1]}. Perhaps {reason}")
        return True

    def _try(self, module: nn.Module, call: Call, grad: bool) -> dict[str, Any] | Exception:
        """What a call does, or its error. The call writes into copies of the buffers."""
        seed_everything(_SEED)
        buffers = {part: part._buffers for part in module.modules() if part._buffers}
        for part, own in buffers.items():
            part._buffers = {name: None if x is None else x.clone() for name, x in own.items()}
        try:
            with torch.set_grad_enabled(grad):
                return observe(module, call, self._small(module), grad=grad)
        except Exception as error:
            return error
        finally:
            for part, own in buffers.items():
                part._buffers = own
            if tensor_versions(self._large) != self._versions:
                raise CaptureError("its forward writes into parameters, now also of the model itself. Load it again")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:400]}"
