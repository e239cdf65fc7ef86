"""Let an optimizer step in the sum and the difference of each pair of vectors (`hra_fx.functional.pairs`).

Parameters, files and everything that reads them keep the vectors: only inside of `optimizer.step` do the parameters and
their gradients hold pair coordinates. Hooks of the optimizer convert them, because every way to call `step` runs them:
schedulers, GradScaler and accelerate replace `optimizer.step`, also by one that they took before. They do not run after
an error, so `optimizer.step` is wrapped too.

Each parameter group has `difference` under `hra_pair_difference`, so that it is saved with the optimizer's state, which
is in pair coordinates.
"""

from __future__ import annotations

import functools
import math
import types
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import ASGD, Optimizer

from hra_fx.compat import renew_step_of_accelerate
from hra_fx.errors import AdapterError, ConfigError, HRAWarning
from hra_fx.layers.adapters import get_adapters
from hra_fx.layers.peft_layers import is_peft_hra_layer
from hra_fx.layers.sharding import is_dtensor, local_tensor
from hra_fx.model.pair_batch import PairBatch

#: The entry of a parameter group that holds `difference`.
KEY = "hra_pair_difference"
#: A warning names so many vectors.
_LISTED = 8
_LOST = "not a parameter of the optimizer now"
_AVERAGES = "the optimizer averages parameters outside of its step"


class _Vectors(NamedTuple):
    """The vectors of an adapter of a layer, which an optimizer steps, and why not in pairs."""

    path: str
    tensor: Any
    why_not: str | None


def train_pairs(optimizer: Any, model: nn.Module, difference: float = 0.1) -> None:
    """Let an optimizer step in the sum and the difference of each pair of vectors: HRA then learns as LoRA does.

    Call it once, before the first step and before loading a state into the optimizer. The vectors `u_1`, `u_2` of a
    pair are `L (m + c d)`, `L (m - c d)`, with `L` the length at which they start, and the optimizer steps `m` and `d`.
    Without it, AdamW hardly turns `m`, the input direction of a pair. Between steps, parameters and gradients are those
    of the vectors, so gradient clipping, files, folds and exports are the same.

    Any optimizer of torch or bitsandbytes works, and with DDP, FSDP2, tensor parallelism, GradScaler and schedulers.
    Decoupled weight decay and that of SGD shrink `m` and `d` alike, so they change the lengths of vectors only, as
    without pairs. Call it again for a copy of the optimizer. Other hooks of `step` may see pair coordinates.

    Args:
        optimizer: a `torch.optim.Optimizer`, or accelerate's wrapper of one.
        model: a transformed model, or one with PEFT's HRA layers; wrapped or not. Adapters that are added to the same
            layers later train in pairs too. For other layers, and other models of the same optimizer, call it again.
        difference: `c`; a smaller one makes steps of differences smaller.

    Raises:
        ConfigError: `difference` is not a finite number > 0.
        AdapterError: the optimizer steps no vectors of the model; it has a state without pairs; or it trains pairs with
            another `difference`. Loading a state that was saved without pairs, or with another `difference`, is refused
            in the same way.

    Warns:
        HRAWarning: some vectors are stepped as they are, and why: odd ranks, Gram-Schmidt, anchors, 16-bit vectors,
            flat parameters (FSDP1, DeepSpeed ZeRO), and optimizers that average the parameters outside of `step`
            (schedule-free ones, ASGD).

    Example:
        >>> from hra_fx.config import HRAConfig
        >>> from hra_fx.api.transform import transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
        >>> train_pairs(optimizer, model)
        >>> model(torch.ones(1, 6)).sum().backward()
        >>> optimizer.step()
    """
    wrapper, optimizer = optimizer, _torch_optimizer(optimizer)
    check_difference(difference)
    known = _KNOWN.get(optimizer)
    pairs = _Pairs(float(difference)) if known is None else known
    if pairs.difference != difference:
        raise AdapterError(
            f"this optimizer trains pairs with difference={pairs.difference}, got {difference}. Make a new optimizer."
        )
    layers = _adapted_layers(model)
    found = list(_stepped(layers, optimizer))
    if not found:
        raise AdapterError(
            f"the optimizer steps no vectors of {type(model).__name__}. Adapt the model first, pass trainable vectors "
            "to the optimizer, and call train_pairs before a tool flattens the parameters (FSDP1, DeepSpeed ZeRO)."
        )
    if isinstance(optimizer, ASGD) or callable(getattr(optimizer, "eval", None)):
        pairs.warn([one._replace(why_not=_AVERAGES) for one in found])
        return
    if known is None:
        _check_state(optimizer, found, pairs.difference)
        _install(optimizer, pairs)
        renew_step_of_accelerate(wrapper)
    pairs.layers.update(layers)
    pairs.warn(found)


def train_pairs_if_possible(optimizer: Any, model: nn.Module, difference: float) -> None:
    """Call `train_pairs` for the optimizer of a Trainer, unless that trains pairs already.

    Warns:
        HRAWarning: the optimizer steps no vectors of the model, though some are trained.
    """
    layers, inner = _adapted_layers(model), _unwrapped(optimizer)
    if inner in _KNOWN:
        return
    if isinstance(inner, Optimizer) and any(True for _ in _stepped(layers, inner)):
        train_pairs(optimizer, model, difference)
        return
    trained = [
        _Vectors(f"{path}.hra_u.{name}", tensor, _LOST)
        for layer, path in layers.items()
        for name, tensor, _ in _adapters(layer)
        if tensor.requires_grad
    ]
    _Pairs(difference).warn(trained)


def refuse_states_of_pairs(optimizer: Optimizer) -> None:
    """Let an optimizer of vectors raise an `AdapterError` when it loads a state of pairs."""

    def check(_: Any, state_dict: dict[str, Any]) -> None:
        saved = {group[KEY] for group in state_dict["param_groups"] if KEY in group}
        if saved:
            raise AdapterError(
                f"the state was saved with pairs, difference={min(saved)}, but the optimizer steps vectors. Pass "
                f"pair_difference={min(saved)}, or start without the state."
            )

    optimizer.register_load_state_dict_pre_hook(check)


class _Pairs:
    """The conversion of the vectors that one optimizer steps.

    Attributes:
        difference: `c`.
        layers: adapted layer, which is not kept alive -> its path.
        batches: the vectors that are in pair coordinates now.
        depth: how many calls of `step` run: one may call that of its base class.
        warned: paths of vectors of which a warning has told that they are not stepped in pairs.
    """

    def __init__(self, difference: float) -> None:
        self.difference = difference
        self.layers: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.batches: list[PairBatch] = []
        self.depth = 0
        self.warned: set[str] = set()

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Go to pair coordinates; a closure computes a loss and gradients, so it runs in vectors."""
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
        """Go back to vectors."""
        self.depth -= 1
        if self.depth == 0:
            self._leave()

    def end(self) -> None:
        """Go back to vectors, whatever has happened."""
        self.depth = 0
        self._leave()

    @torch.no_grad()
    def _enter(self, optimizer: Any) -> None:
        found = list(_stepped(self.layers, optimizer))
        if found:  # some optimizers load a state without running hooks
            _check_groups(optimizer.param_groups, self.difference)
        self.warn(found or [_Vectors(path, None, _LOST) for path in self.layers.values()])
        alike = defaultdict(list)
        for _, tensor, why_not in found:
            if why_not is None and tensor.grad is not None:
                alike[tensor.shape, local_tensor(tensor).shape, tensor.dtype, tensor.device].append(tensor)
        made = [PairBatch(tensors, self.difference) for tensors in alike.values()]
        for batch in made:
            self.batches.append(batch)
            batch.enter()

    @torch.no_grad()
    def _leave(self) -> None:
        """Make all parameters and gradients vectors again, if they are not."""
        while self.batches:
            self.batches.pop().leave()

    def warn(self, found: list[_Vectors]) -> None:
        """Name the vectors that are not stepped in pairs, once each."""
        left = [f"{path} ({why})" for path, _, why in found if why is not None and path not in self.warned]
        self.warned.update(path for path, _, why in found if why is not None)
        if left:
            more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
            text = f"train_pairs: the optimizer does not step these in pairs: {', '.join(left[:_LISTED])}{more}."
            warnings.warn(text, HRAWarning, stacklevel=3)


#: Optimizer -> its conversion.
_KNOWN: weakref.WeakKeyDictionary[Optimizer, _Pairs] = weakref.WeakKeyDictionary()


def _install(optimizer: Optimizer, pairs: _Pairs) -> None:
    _KNOWN[optimizer] = pairs
    optimizer.defaults[KEY] = pairs.difference  # for groups that are added later
    for group in optimizer.param_groups:
        group[KEY] = pairs.difference
    optimizer.register_step_pre_hook(pairs.before_step)
    optimizer.register_step_post_hook(pairs.after_step)
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state_dict: _check_groups(state_dict["param_groups"], pairs.difference)
    )
    optimizer.step = _guarded(optimizer, pairs)  # type: ignore[method-assign]


def _guarded(optimizer: Optimizer, pairs: _Pairs) -> Any:
    """The method `step` of an optimizer, after which vectors are vectors again, whatever happens.

    As the `step` that schedulers of torch set, it has no strong reference to the optimizer: in a cycle, this would keep
    its state until a garbage collection.
    """
    held, own = weakref.ref(optimizer), optimizer.step
    if isinstance(own, types.MethodType):
        function: Any = own.__func__
    else:  # a scheduler has set a function that finds its optimizer

        @functools.wraps(own)
        def function(_: Any, *args: Any, **kwargs: Any) -> Any:
            return scheduled(*args, **kwargs)

        scheduled = own

    @functools.wraps(function)
    def step(_: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(held(), *args, **kwargs)
        finally:
            pairs.end()

    return types.MethodType(step, weakref.proxy(optimizer))


def _torch_optimizer(optimizer: Any) -> Optimizer:
    inner = _unwrapped(optimizer)
    if not isinstance(inner, Optimizer):
        raise AdapterError(f"`optimizer` must be a torch.optim.Optimizer, got {type(inner).__name__}.")
    return inner


def _unwrapped(optimizer: Any) -> Any:
    """What is inside of accelerate's wrappers."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def check_difference(difference: Any, field: str = "difference") -> None:
    """Check `difference`.

    Raises:
        ConfigError: it is not a finite number > 0.
    """
    is_number = isinstance(difference, (int, float)) and not isinstance(difference, bool)
    if not is_number or not 0 < difference < math.inf:
        raise ConfigError(f"`{field}` must be a finite number > 0, got {difference!r}. The default is 0.1.")


def _check_groups(groups: Iterable[dict[str, Any]], difference: float) -> None:
    """Refuse a state that is not in these pair coordinates."""
    for group in groups:
        if (saved := group.get(KEY)) != difference:
            how = "without pairs" if saved is None else f"with difference={saved}"
            fix = "Leave train_pairs out" if saved is None else f"Call train_pairs(..., difference={saved})"
            raise AdapterError(
                f"the optimizer trains pairs with difference={difference}, but the state was saved {how}. {fix} "
                f"(HRATrainer: pair_difference={saved}), or start without the state."
            )


def _check_state(optimizer: Optimizer, found: list[_Vectors], difference: float) -> None:
    """Refuse an optimizer that has a state, unless that is in these pair coordinates."""
    if any(KEY in group for group in optimizer.param_groups):
        _check_groups(optimizer.param_groups, difference)
    elif any(_has_stepped(optimizer.state.get(one.tensor)) for one in found):
        raise AdapterError(
            "the optimizer has a state of steps without pairs. Call train_pairs before the first step, and before "
            "load_state_dict, or make a new optimizer."
        )


def _has_stepped(state: Any) -> bool:
    """Whether the state of a parameter is that of some steps. Adagrad has one before."""
    return bool(state) and float(state.get("step", 1)) > 0


def _adapted_layers(model: Any) -> dict[nn.Module, str]:
    if not isinstance(model, nn.Module):
        raise AdapterError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    return {
        module: path
        for path, module in model.named_modules()
        if get_adapters(module) is not None or is_peft_hra_layer(module)
    }


def _stepped(layers: Any, optimizer: Optimizer) -> Iterator[_Vectors]:
    """The vectors that an optimizer steps; looked up in each step, because FSDP2 and others replace parameters."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer, path in layers.items():
        for name, tensor, why_not in _adapters(layer):
            if id(tensor) in stepped:
                yield _Vectors(f"{path}.hra_u.{name}", tensor, why_not)


def _adapters(layer: Any) -> Iterator[tuple[str, Any, str | None]]:
    """Name, vectors, and why these are not stepped in pairs, of all adapters of a layer of hra_fx or PEFT."""
    own = get_adapters(layer)
    if own is None:
        ranks, parameters = dict(layer.hra_r), layer.hra_u._parameters
    else:
        ranks, parameters = {name: spec.r for name, spec in own.specs.items()}, own._parameters
    for name, r in ranks.items():
        tensor = parameters.get(name)
        apply_GS = layer.hra_apply_GS[name] if own is None else own.specs[name].apply_GS
        if tensor is not None:
            anchored = own is not None and own.anchor(name) is not None
            yield name, tensor, _why_not(tensor, r, apply_GS=apply_GS, anchored=anchored)


def _why_not(vectors: Any, r: int, *, apply_GS: bool, anchored: bool) -> str | None:
    if vectors.dim() < 2 or vectors.shape[-1] != r:
        return "part of a flat parameter"
    if apply_GS:
        return "Gram-Schmidt"
    if r % 2:
        return f"odd rank {r}"
    if anchored:
        return "anchor"
    if vectors.dtype not in (torch.float32, torch.float64):
        return str(vectors.dtype).removeprefix("torch.")
    if is_dtensor(vectors) and any(one.is_shard(vectors.dim() - 1) for one in vectors.placements):
        return "sharded by columns"
    return None
