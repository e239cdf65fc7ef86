"""Make an optimizer update the sum and the difference of each pair of vectors (`hra_fx.functional.pairs`).

The parameters and everything that reads them, such as files, contain the vectors. Only during `optimizer.step`, the
parameters and their gradients contain pair coordinates. Hooks of the optimizer convert them, because hooks run for
every way to call `step`: schedulers, GradScaler and accelerate replace `optimizer.step`, sometimes with a method that
they stored before. Hooks do not run after an error, so `optimizer.step` is also wrapped.

Each parameter group stores `difference` under `hra_pair_difference`, so that it is saved with the optimizer's state,
which is in pair coordinates.
"""

from __future__ import annotations

import functools
import math
import types
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hra_fx.compat import copy_all, renew_step_of_accelerate
from hra_fx.errors import AdapterError, ConfigError, HRAWarning
from hra_fx.functional.pairs import from_pairs, gradients_to_pairs, start_length, to_pairs
from hra_fx.layers.sharding import as_dtensor, is_dtensor, local_tensor
from hra_fx.model.state import unwrap
from hra_fx.selection.suggestions import some_of
from hra_fx.training.layer_inputs import main_directions
from hra_fx.training.protect import project_last
from hra_fx.training.vectors import (
    Vectors,
    averages_parameters,
    layers_with_vectors,
    required_vectors,
    stepped_vectors,
    unwrapped,
    vectors_of,
    warn_of_zero_gradients,
    without_directions,
)

#: The entry of a parameter group that stores `difference`.
KEY = "hra_pair_difference"
_LOST = "no longer a parameter of the optimizer"


def train_pairs(
    optimizer: Any,
    model: nn.Module,
    difference: float = 0.1,
    batches: Iterable[Any] | None = None,
    directions: int = 4,
) -> None:
    """Train the vectors in pairs: the optimizer updates the sum and the difference of each pair of vectors.

    HRA then learns almost as well as LoRA, at LoRA's learning rates. Call this function once, before the first step and
    before you load a state into the optimizer. The vectors of a pair are `u_1 = L (m + c d)` and `u_2 = L (m - c d)`,
    where `L` is their initial length, and the optimizer updates `m` and `d`. Otherwise, AdamW hardly changes the
    direction of `m`, the input direction of a pair. Between steps, parameters and gradients are those of the vectors,
    so gradient clipping, files, folds and exports do not change.

    This works with any optimizer of torch or bitsandbytes, and with DDP, FSDP2, GradScaler and
    schedulers. Decoupled weight decay and the weight decay of SGD scale `m` and `d` by the same factor. So they only
    change the lengths of vectors, as without pairs. Call this function again for a copy of the optimizer. Post
    hooks of `step` that are registered before this call see pair coordinates, and so do pre hooks that are registered
    after it.

    The inputs of most layers have a few main directions, nearly their mean. A reflection also maps inputs along `d` to
    `-m`, and along these directions that part is large from the first step. With `batches`, `d` stays orthogonal to
    them, so high learning rates have fewer spikes of the loss.

    Args:
        optimizer: a `torch.optim.Optimizer`, or accelerate's wrapper of one.
        model: a transformed model, or a model with PEFT's HRA layers; wrapped or not. Adapters that are added to the
            same layers later train in pairs too. For other layers, and for other models of the same optimizer, call
            this function again.
        difference: `c`; a smaller value makes the steps of `d` smaller.
        batches: one or two batches of the training data, each as in `protect`, which the model runs without adapters.
            The directions are not in the optimizer's state: pass batches again to continue a training.
        directions: the number of main directions in each layer, at most half of the width of its inputs.

    Raises:
        ConfigError: `difference` is not a finite number > 0, or `directions` does not fit.
        AdapterError: the optimizer does not update any vectors of the model; it has a state without pairs; or it trains
            pairs with another `difference`; `batches` is empty, or has inputs that are not finite. Loading a state that
            was saved without pairs, or with another `difference`, raises the same error.

    Warns:
        HRAWarning: some vectors are not trained in pairs; the message names the reason: odd ranks, Gram-Schmidt,
            16-bit vectors, flat parameters (FSDP1, DeepSpeed ZeRO), or an optimizer that averages the parameters
            outside of `step` (schedule-free optimizers, ASGD). No batch reached some layers. In the first step, the
            gradients of all vectors are zero.

    Example:
        >>> from hra_fx.config import HRAConfig
        >>> from hra_fx.api.transform import transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
        >>> train_pairs(optimizer, model)
        >>> model(torch.ones(1, 6)).sum().backward()
        >>> optimizer.step()
    """
    wrapper, optimizer = optimizer, unwrapped(optimizer)
    check_difference(difference)
    layers = layers_with_vectors(model)
    found = required_vectors(layers, optimizer, model, "train_pairs")
    known = _KNOWN.get(optimizer)
    pairs = _Pairs(float(difference)) if known is None else known
    if pairs.difference != difference:
        raise AdapterError(
            f"this optimizer trains pairs with difference={pairs.difference}, got {difference}. Create a new optimizer."
        )
    if averages_parameters(optimizer):
        pairs.warn({one.path: "the optimizer averages parameters outside of its step" for one in found})
        return
    if batches is not None:
        pairs.quiet.update(main_directions("train_pairs", unwrap(model), found, batches, directions))
    if known is None:
        _check_state(optimizer, found, pairs.difference)
        _install(optimizer, pairs)
        renew_step_of_accelerate(wrapper)
        project_last(optimizer)
    pairs.layers.update(layers)
    pairs.warn(_reasons(found))


def train_pairs_if_possible(
    optimizer: Any,
    model: nn.Module,
    difference: float,
    batches: Iterable[Any] | None,
    directions: int,
) -> None:
    """Call `train_pairs` for the optimizer of a Trainer, unless it already trains pairs.

    Warns:
        HRAWarning: the optimizer does not have any vectors of the model, although some are trainable.
    """
    layers, inner = layers_with_vectors(model), unwrapped(optimizer)
    if inner in _KNOWN:
        return
    if isinstance(inner, Optimizer) and stepped_vectors(layers, inner):
        train_pairs(optimizer, model, difference, batches, directions)
        return
    _Pairs(difference).warn({one.path: _LOST for one in vectors_of(layers) if one.tensor.requires_grad})


def refuse_states_of_pairs(optimizer: Optimizer) -> None:
    """Make an optimizer without pairs raise an `AdapterError` when it loads a state with pairs."""

    def check(_: Any, state_dict: dict[str, Any]) -> None:
        saved = {group[KEY] for group in state_dict["param_groups"] if KEY in group}
        if saved:
            raise AdapterError(
                f"the state was saved with pairs, difference={min(saved)}, but the optimizer does not use pairs. Pass "
                f"pair_difference={min(saved)}, or start without the state."
            )

    optimizer.register_load_state_dict_pre_hook(check)


class _Pairs:
    """Converts the vectors that one optimizer updates.

    Attributes:
        difference: `c`.
        layers: adapted layer (a weak reference) -> its path.
        quiet: adapted layer -> the directions to which the differences are orthogonal.
        batches: the vectors that are currently in pair coordinates.
        depth: the number of nested calls of `step`: a `step` may call the `step` of its base class.
        warned: paths of the vectors that a warning has already named.
    """

    def __init__(self, difference: float) -> None:
        self.difference = difference
        self.layers: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.quiet: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()
        self.batches: list[_PairBatch] = []
        self.depth = 0
        self.warned: set[str] = set()

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Convert to pair coordinates. A closure computes a loss and gradients, so it runs with vectors."""
        self.depth += 1
        if self.depth > 1:
            return args, kwargs
        self._enter(optimizer)
        held = weakref.ref(optimizer)

        def in_vectors(closure: Any) -> Any:
            def called() -> Any:
                self._leave()
                loss = closure()
                self._enter(held())
                return loss

            return called if callable(closure) else closure

        # The first argument is the optimizer.
        args = (*args[:1], *map(in_vectors, args[1:2]), *args[2:])
        return args, kwargs | {key: in_vectors(kwargs[key]) for key in kwargs if key == "closure"}

    def after_step(self, *_: Any) -> None:
        """Convert back to vectors."""
        self.depth -= 1
        if self.depth == 0:
            self._leave()

    def end(self) -> None:
        """Convert back to vectors, even after an error."""
        self.depth = 0
        self._leave()

    @torch.no_grad()
    def _enter(self, optimizer: Any) -> None:
        found = stepped_vectors(self.layers, optimizer)
        if found:  # some optimizers load a state without running hooks
            _check_groups(optimizer.param_groups, self.difference)
        reasons = _reasons(found)
        self.warn(reasons if found else dict.fromkeys(self.layers.values(), _LOST))
        alike: dict[Any, tuple[list[nn.Parameter], list[Tensor]]] = defaultdict(lambda: ([], []))
        for layer, path, tensor, *_ in found:
            if path not in reasons and tensor.grad is not None:
                quiet = [self.quiet[layer]] if layer in self.quiet else []
                shapes = tuple(one.shape for one in (tensor, local_tensor(tensor), *quiet))
                key = shapes, tensor.dtype, tensor.device
                alike[key][0].append(tensor)
                alike[key][1].extend(quiet)
        made = [_PairBatch(tensors, self.difference, quiet) for tensors, quiet in alike.values()]
        for batch in made:
            self.batches.append(batch)
            batch.enter()

    @torch.no_grad()
    def _leave(self) -> None:
        """Convert all parameters and gradients that are in pair coordinates back to vectors."""
        while self.batches:
            self.batches.pop().leave()

    def warn(self, reasons: dict[str, str]) -> None:
        """Warn about vectors that are not trained in pairs, once for each: path -> reason."""
        left = [f"{path} ({why})" for path, why in reasons.items() if path not in self.warned]
        self.warned |= reasons.keys()
        if left:
            text = f"train_pairs: these vectors are not trained in pairs: {some_of(left)}."
            warnings.warn(text, HRAWarning, stacklevel=3)


#: Optimizer -> its conversion.
_KNOWN: weakref.WeakKeyDictionary[Optimizer, _Pairs] = weakref.WeakKeyDictionary()


def _install(optimizer: Optimizer, pairs: _Pairs) -> None:
    _KNOWN[optimizer] = pairs
    optimizer.defaults[KEY] = pairs.difference  # for groups that are added later
    for group in optimizer.param_groups:
        group[KEY] = pairs.difference
    warn_of_zero_gradients(optimizer, pairs.layers)
    optimizer.register_step_pre_hook(pairs.before_step)
    optimizer.register_step_post_hook(pairs.after_step)
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state_dict: _check_groups(state_dict["param_groups"], pairs.difference)
    )
    optimizer.step = _guarded(optimizer, pairs)  # type: ignore[method-assign]


def _guarded(optimizer: Optimizer, pairs: _Pairs) -> Any:
    """Wrap the method `step` of an optimizer, so that parameters are vectors again afterwards, even after an error.

    Like the `step` that torch's schedulers set, it does not have a strong reference to the optimizer: a reference cycle
    would keep the optimizer's state until the next garbage collection.
    """
    held, own = weakref.ref(optimizer), optimizer.step
    if isinstance(own, types.MethodType):
        function: Any = own.__func__
    else:  # a scheduler has set a function that finds its optimizer

        @functools.wraps(own)
        def function(_: Any, *args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

    @functools.wraps(function)
    def step(_: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(held(), *args, **kwargs)
        finally:
            pairs.end()

    return types.MethodType(step, weakref.proxy(optimizer))


def check_difference(difference: Any, field: str = "difference") -> None:
    """Check that `difference` is valid."""
    is_number = isinstance(difference, (int, float)) and not isinstance(difference, bool)
    if not is_number or not 0 < difference < math.inf:
        raise ConfigError(f"`{field}` must be a finite number > 0, got {difference!r}. The default is 0.1.")


def _check_groups(groups: Iterable[dict[str, Any]], difference: float) -> None:
    """Raise an error for a state that is not in these pair coordinates."""
    for group in groups:
        if (saved := group.get(KEY)) != difference:
            how = "without pairs" if saved is None else f"with difference={saved}"
            fix = "Leave train_pairs out" if saved is None else f"Call train_pairs(..., difference={saved})"
            raise AdapterError(
                f"the optimizer trains pairs with difference={difference}, but the state was saved {how}. {fix} "
                f"(HRATrainer: pair_difference={saved}), or start without the state."
            )


def _check_state(optimizer: Optimizer, found: list[Vectors], difference: float) -> None:
    """Raise an error if the optimizer has a state that is not in these pair coordinates."""
    if any(KEY in group for group in optimizer.param_groups):
        _check_groups(optimizer.param_groups, difference)
    # Adagrad has a state before the first step.
    elif any(state and float(state.get("step", 1)) > 0 for state in (optimizer.state.get(v.tensor) for v in found)):
        raise AdapterError(
            "the optimizer has a state of steps without pairs. Call train_pairs before the first step and before "
            "load_state_dict, or create a new optimizer."
        )


def _reasons(found: list[Vectors]) -> dict[str, str]:
    """Path of vectors that are not trained in pairs -> the reason."""
    return {one.path: why for one in found if (why := _why_not(one))}


def _why_not(one: Vectors) -> str | None:
    vectors = one.tensor
    if one.is_flat:
        return "part of a flat parameter"
    if one.apply_GS:
        return "Gram-Schmidt"
    if one.r % 2:
        return f"odd rank {one.r}"
    if vectors.dtype not in (torch.float32, torch.float64):
        return str(vectors.dtype).removeprefix("torch.")
    if is_dtensor(vectors) and any(one.is_shard(vectors.dim() - 1) for one in vectors.placements):
        return "sharded by columns"
    return None


class _PairBatch:
    """Vectors with the same shape, converted together: this takes a few operators for any number of layers."""

    def __init__(self, vectors: list[nn.Parameter], difference: float, quiet: list[Tensor]) -> None:
        """Compute pair coordinates. This does not change anything, so an error here leaves the vectors unchanged.

        `quiet` has the directions of each layer to which differences are orthogonal after the step, or is empty.
        """
        self.quiet = quiet
        self.constants = start_length(*vectors[0].shape[-2:]), difference
        self.vectors, self.gradients = vectors, [one.grad for one in vectors if one.grad is not None]
        self.values = [local_tensor(one) for one in vectors]
        self.before = torch.stack(self.values)
        self.pairs = to_pairs(self.before, *self.constants)
        made = gradients_to_pairs(torch.stack([*map(local_tensor, self.gradients)]), *self.constants)
        self.made = [_like(one, own) for one, own in zip(made.unbind(), self.gradients, strict=True)]

    def enter(self) -> None:
        """Write pair coordinates into the parameters, and set their gradients."""
        copy_all(self.values, list(self.pairs.unbind()))
        for vectors, gradient in zip(self.vectors, self.made, strict=True):
            vectors.grad = gradient

    def leave(self) -> None:
        """Add the change of the step to the vectors, so that unchanged vectors keep their exact values."""
        values = self.before
        try:
            stepped = torch.stack(self.values)
            if self.quiet:
                stepped[..., 1::2] = self._quieted(stepped[..., 1::2])
            values = self.before + from_pairs(stepped.sub_(self.pairs), *self.constants)
        finally:
            copy_all(self.values, list(values.unbind()))
            for vectors, made, own in zip(self.vectors, self.made, self.gradients, strict=True):
                if vectors.grad is made:
                    vectors.grad = own

    def _quieted(self, differences: Tensor) -> Tensor:
        """Differences `(layers, ..., d, pairs)` without their parts along the directions."""
        if not is_dtensor(self.vectors[0]):
            return without_directions(differences, torch.stack(self.quiet))  # type: ignore[no-any-return]
        each = zip(differences, self.vectors, self.quiet, strict=True)
        whole = [(_like(own, vectors, vectors.shape[-1] // 2), basis) for own, vectors, basis in each]
        return torch.stack([local_tensor(without_directions(own, basis)) for own, basis in whole])


def _like(values: Tensor, other: Any, columns: int | None = None) -> Any:
    """Distribute the local part of a tensor like another tensor, which may have another number of columns."""
    shape = (*other.shape[:-1], columns or other.shape[-1])
    return as_dtensor(values, other.device_mesh, other.placements, torch.Size(shape)) if is_dtensor(other) else values
