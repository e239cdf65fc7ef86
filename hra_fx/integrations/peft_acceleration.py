"""Run PEFT's HRA layers with the kernels of hra_fx, until a handle is closed.

The class of each layer is replaced with a subclass of the same name. For models that are created later, the two classes
are also replaced in PEFT's modules.

The factors of all layers of a `PeftModel` are computed in batches. This uses `_enable_peft_forward_hooks`: a
`PeftModel` enters this context of its inner model around each forward and `generate`, if the inner model has the method
(PEFT's LoRA has it for mixed batches). Layers that are injected into a model without a `PeftModel` compute their own
factors.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from hra_fx.compat import is_replica
from hra_fx.errors import AdapterError
from hra_fx.integrations.peft_layers import OPEN, AcceleratedConv2d, AcceleratedLayer, AcceleratedLinear
from hra_fx.layers.batching import start_of_forward
from hra_fx.layers.class_swap import mixins_of, swap, swapped_class, unswap
from hra_fx.layers.running import RUNNING
from hra_fx.layers.sharding import is_sharded
from hra_fx.layers.target import width_of

#: PEFT's class -> the mixin for it.
_MIXINS: dict[str, type[AcceleratedLayer]] = {"HRALinear": AcceleratedLinear, "HRAConv2d": AcceleratedConv2d}
_AROUND = "_enable_peft_forward_hooks"


class Acceleration:
    """The handle that `accelerate_peft` returns. As a context manager, it is closed at the end of the block.

    Attributes:
        layers: the layers that it has accelerated.
        collects: whether it also accelerates new layers.
    """

    def __init__(self, layers: WeakSet[nn.Module], *, collects: bool) -> None:
        """Accelerate layers, and new ones if `collects`."""
        self.layers = layers
        self.collects = collects
        OPEN.append(self)
        _update_peft()
        for layer in layers:
            _accelerate(layer)

    def close(self) -> None:
        """Restore PEFT's code, except in layers of other open handles. Further calls have no effect."""
        if self not in OPEN:
            return
        OPEN.remove(self)
        _update_peft()
        for layer in self.layers:
            if not any(layer in other.layers for other in OPEN):
                _restore(layer)

    def __enter__(self) -> Acceleration:
        """Return the handle, which is already open."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the handle."""
        self.close()


def accelerate_peft(model: nn.Module | None = None) -> Acceleration:
    """Run PEFT's own HRA layers with the faster kernels of hra_fx.

    Outputs and gradients are those of `W Q`, but need less time and memory. Parameters and their names, files,
    active adapters, `merge_adapter`, `disable_adapter` and trainers that check for a `peft.PeftModel` work as before.
    Cases that PEFT computes incorrectly become correct: convolutions with dilation, non-square kernels, unequal strides
    or paddings, groups or padding modes; quantized base weights; zero vectors.

    Args:
        model: a `peft.PeftModel`, or any module with PEFT's HRA layers, to accelerate. `None` accelerates all HRA
            layers that PEFT creates from now on, including those of trainers that take a `peft.HRAConfig`.

    Returns:
        A handle, which is also a context manager. Its method `close()` restores PEFT's code in these and in new layers.
        A copy of an accelerated model, even a pickled one, stays accelerated: call `accelerate_peft(copy).close()`.

    Raises:
        ImportError: PEFT is not installed.
        AdapterError: the model has no HRA layers of PEFT, or PEFT created vectors of the wrong length.

    Example:
        >>> import peft, torch
        >>> with accelerate_peft():
        ...     model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        ...     model = peft.get_peft_model(model, peft.HRAConfig(r=2, target_modules=["0"]))
        ...     model(torch.ones(1, 6)).shape
        torch.Size([1, 4])
    """
    if model is None:
        _peft_classes()
        return Acceleration(WeakSet(), collects=True)
    kinds = tuple(_peft_classes().values())
    layers = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    if not layers:
        raise AdapterError(
            f"{type(model).__name__} has no HRA layers of PEFT. Pass a model from peft.get_peft_model(model, "
            "peft.HRAConfig(...)). Models from hra_fx.transform already use these kernels."
        )
    for path, layer in layers.items():
        _check_vectors(path, layer)
    return Acceleration(WeakSet(layers.values()), collects=False)


def _peft_classes() -> dict[str, Any]:
    """PEFT's layer classes, by name."""
    try:
        module = importlib.import_module("peft.tuners.hra")
    except ModuleNotFoundError as error:
        raise ImportError("accelerate_peft needs PEFT with HRA. Run: pip install peft.") from error
    return {name: getattr(module, name) for name in _MIXINS}


def _update_peft() -> None:
    """Set the classes that PEFT uses to create layers, and whether its models compute factors in batches."""
    module = importlib.import_module("peft.tuners.hra.model")
    accelerated = any(handle.collects for handle in OPEN)
    for name, cls in _peft_classes().items():
        setattr(module, name, swapped_class(_MIXINS[name], cls) if accelerated else cls)
    if OPEN:
        setattr(module.HRAModel, _AROUND, _in_batches)
    elif _AROUND in vars(module.HRAModel):
        delattr(module.HRAModel, _AROUND)


def _mixin_of(layer: nn.Module) -> type[AcceleratedLayer]:
    return next(_MIXINS[name] for name, cls in _peft_classes().items() if isinstance(layer, cls))


def _accelerate(layer: Any) -> None:
    mixin = _mixin_of(layer)
    if mixin not in mixins_of(layer):
        swap(layer, mixin)
        layer.read_vectors()


def _restore(layer: Any) -> None:
    mixin = _mixin_of(layer)
    if mixin in mixins_of(layer):
        layer.forget_vectors()
        unswap(layer, mixin)


def _check_vectors(path: str, layer: Any) -> None:
    """Check that vectors are as long as a row of the weight. PEFT creates wrong lengths for non-square kernels."""
    width = width_of(layer.get_base_layer())
    for name, vectors in layer.hra_u.items():
        if vectors.shape[0] != width:
            raise AdapterError(
                f"{path}: PEFT created the vectors of {name!r} with length {vectors.shape[0]}, but a row of the weight "
                f"has {width} entries. Create the adapter after hra_fx.accelerate_peft()."
            )


@contextmanager
def _in_batches(tuner: nn.Module, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Compute the factors of a model in batches during a forward or `generate`."""
    sites = _sites(tuner)
    outer = RUNNING.run
    if outer is None or not outer.is_current():
        RUNNING.run = start_of_forward(sites)
    try:
        yield
    finally:
        RUNNING.run = outer


def _sites(tuner: nn.Module) -> list[nn.Module]:
    """The active layers of a model; empty if their factors cannot be batched (see `hra_fx.model.root`)."""
    if torch.compiler.is_compiling() or is_replica(tuner) or is_sharded(tuner):
        return []
    layers = (module for module in tuner.modules() if isinstance(module, AcceleratedLayer))
    return [site for layer in layers if (site := layer.acting()) is not None]
