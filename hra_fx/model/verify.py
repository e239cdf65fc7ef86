"""`transform(..., verify=True)`: compare a transformed model with its folded weights, on a copy with random vectors.

The copy runs with its adapters, and again after they are folded, in train and eval mode and with the same random
numbers. Outputs must agree. The gradient of the vectors must equal the gradient of the folded weight, propagated back
through `W Q`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hra_fx.compat import pytree
from hra_fx.errors import HRAError, HRAWarning, UnsupportedLayerError, VerificationError
from hra_fx.functional.rotate import rotate_weight
from hra_fx.layers.accelerate_hooks import offloading_hook
from hra_fx.layers.quantized import quant_scheme_of
from hra_fx.model.example_inputs import Call, clone_inputs, preserve_rng_state, seed_everything
from hra_fx.model.fold import prepare_fold
from hra_fx.model.merge import base_weight
from hra_fx.model.state import adapted_layers

_SEED = 20240517
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
_REPORT = "The model is unchanged. Leave the layers out with exclude_modules, and please open an issue."


class _Run(NamedTuple):
    """Floating-point outputs of one call, gradients of the selected parameters, and outputs of each module."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]
    modules: list[tuple[str, list[Tensor]]]


def check_against_folded(model: nn.Module, call: Call) -> None:
    """Compare a transformed model with its folded version, in float64 if it runs in float64, otherwise in float32.

    The model is not run and not changed. Memory: a copy of the model and the gradients of its adapted weights, both in
    float64, and a few copies of its largest weight.
    """
    _check_verifiable(model)
    class_name = type(model).__name__
    with preserve_rng_state(), torch.inference_mode(False), torch.enable_grad():
        for dtype in (torch.float64, torch.float32, None):  # float64 first: rounding must not change chosen experts
            ours, theirs = _run_both(model, call, dtype)
            if isinstance(theirs[1], _Run):
                break
        for mode, our, their in zip(("train", "eval"), ours, theirs, strict=True):
            if isinstance(our, HRAError):
                raise our
            if isinstance(their, Exception):
                raise VerificationError(
                    f"example_inputs: in {mode} mode, {class_name} fails on them without adapters "
                    f"({type(their).__name__}: {their}). Pass inputs that work with the base model in both modes."
                ) from their
            if isinstance(our, Exception):
                raise VerificationError(
                    f"the model: in {mode} mode, it runs with folded weights, but not with adapters "
                    f"({type(our).__name__}: {our}). {_REPORT}"
                ) from our
            if not their.outputs:
                raise VerificationError(
                    f"example_inputs: in {mode} mode, {class_name} returns no floating-point tensor to compare. Pass "
                    "other inputs, or leave verify out."
                )
            if not _all_close(our.outputs, their.outputs):
                where = _first_difference(*(runs[mode == "eval"] for runs in _run_both(model, call, dtype, trace=True)))
                raise VerificationError(
                    f"{where}: in {mode} mode, its outputs with adapters and with folded weights differ. {_REPORT}"
                )
            _compare_gradients(model, our.gradients, their.gradients, mode)


def _check_verifiable(model: nn.Module) -> None:
    """Check that a copy of the model has whole, exact weights."""
    for path, layer in model.named_modules():
        if scheme := quant_scheme_of(layer):
            raise UnsupportedLayerError(
                f"{path}: it is quantized ({scheme.description(layer)}), so verify=True has no exact folded weight for "
                "the comparison. Leave verify out, or verify the model before quantization."
            )
        if offloading_hook(layer) is not None:
            raise UnsupportedLayerError(
                f"{path}: accelerate offloads it, but verify=True needs a copy of the whole model in memory. Leave "
                "verify out, or verify the model before it is offloaded."
            )
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise UnsupportedLayerError(
                f"{name}: it is on the meta device, so verify=True has no values to compare. Leave verify out, or load "
                "the weights first."
            )


def _run_both(
    model: nn.Module, call: Call, dtype: torch.dtype | None, *, trace: bool = False
) -> tuple[list[_Run | Exception], list[_Run | Exception]]:
    """Run a copy with random vectors in train and eval mode, then fold it and run it again."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value

    call = pytree.tree_map(cast, call)
    copied = copy.deepcopy(model).requires_grad_(False)
    copied._apply(cast)  # type: ignore[no-untyped-call]  # Module.to would drop the imaginary part of complex buffers
    layers = {path: layer for path, layer in adapted_layers(copied).items() if layer.hra_u.active}
    containers = {path: layer.hra_u for path, layer in layers.items()}
    vectors = [adapters[name] for adapters in containers.values() for name in adapters.active]
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in vectors:
            parameter.copy_(torch.randn(parameter.shape, generator=generator)).requires_grad_(True)
    buffers = {name: buffer.clone() for name, buffer in copied.named_buffers()}
    ours = [_run(copied, call, vectors, training, trace) for training in (True, False)]
    containers = copy.deepcopy(containers)  # folding empties them
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", HRAWarning)
        prepare_fold(copied, None, requantize=False).run()
        for name, buffer in copied.named_buffers():
            buffer.copy_(buffers[name])
    weights = [containers[path].weight_of(layer).requires_grad_(True) for path, layer in layers.items()]
    theirs: list[_Run | Exception] = []
    for training in (True, False):
        run = _run(copied, call, weights, training, trace)
        # One mode at a time, because the gradients of all weights take as much memory as the copy.
        theirs.append(_through_rotation(model, containers, run) if isinstance(run, _Run) else run)
        del run
    return ours, theirs


def _run(module: nn.Module, call: Call, selected: Sequence[Tensor], training: bool, trace: bool) -> _Run | Exception:
    """Run the forward, and the backward of a random projection of the outputs; or return the error of the model."""
    seen: list[tuple[str, list[Tensor]]] = []
    parts = [(path, part) for path, part in module.named_modules() if trace and "hra_" not in path]
    hooks = [part.register_forward_hook(_recorder(path, seen)) for path, part in parts]
    seed_everything(_SEED)
    try:
        args, kwargs = clone_inputs(call)
        outputs = _floating(module.train(training)(*args, **kwargs))
    except Exception as error:
        return error
    finally:
        for hook in hooks:
            hook.remove()
    generator = torch.Generator().manual_seed(_SEED)
    # Draw numbers for each output: in the folded model, more outputs may have a gradient.
    terms = [(out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs]
    terms = [term.to(terms[0]) for term in terms if term.requires_grad]
    grads: Any = torch.autograd.grad(terms, selected, allow_unused=True) if terms else (None,) * len(selected)
    return _Run([out.detach() for out in outputs], list(grads), seen)


def _recorder(path: str, seen: list[tuple[str, list[Tensor]]]) -> Any:
    return lambda module, args, output: seen.append((path, [leaf.detach().clone() for leaf in _floating(output)]))


def _through_rotation(model: nn.Module, containers: dict[str, Any], run: _Run) -> _Run:
    """Convert the gradients of folded weights to gradients of the vectors."""
    found: list[Tensor | None] = []
    for (path, adapters), gradient in zip(containers.items(), run.gradients, strict=True):
        vectors = [adapters[name] for name in adapters.active]
        if gradient is None:
            found += [None] * len(vectors)
            continue
        layer: Any = model.get_submodule(path)
        chain = adapters.joint_vectors(adapters.active, torch.float64)
        rotated = rotate_weight(base_weight(layer).double(), chain, transposed=adapters.fan_in_fan_out)
        found += torch.autograd.grad(rotated, vectors, gradient.double())
    return run._replace(gradients=found)


def _compare_gradients(model: nn.Module, ours: list[Tensor | None], theirs: list[Tensor | None], mode: str) -> None:
    names = [(path, name) for path, layer in adapted_layers(model).items() for name in layer.hra_u.active]
    # Compared with the largest gradient, a small gradient may be rounding noise.
    largest = max((float(wanted.norm()) for wanted in theirs if wanted is not None), default=0.0)
    for (path, name), mine, wanted in zip(names, ours, theirs, strict=True):
        if wanted is None:
            continue
        given = torch.zeros_like(wanted) if mine is None else mine
        if not _close(given, wanted, 1e3 * largest * _noise(wanted.dtype)):
            what = "is missing" if mine is None else "is wrong"
            raise VerificationError(f"{path}: in {mode} mode, the gradient of its vectors {name!r} {what}. {_REPORT}")


def _first_difference(ours: _Run | Exception, theirs: _Run | Exception) -> str:
    """The first module with a different output, in the order in which modules finish."""
    if isinstance(ours, _Run) and isinstance(theirs, _Run):
        for (path, mine), (other, wanted) in zip(ours.modules, theirs.modules, strict=False):
            if path == other and not _all_close(mine, wanted):
                return path or "the model"
    return "the model"


def _floating(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if dataclasses.is_dataclass(leaf):
            found += _floating([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        elif isinstance(leaf, Tensor) and leaf.is_floating_point():
            found.append(leaf)
    return found


def _all_close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(_close(a, b) for a, b in zip(ours, theirs, strict=True))


def _close(a: Tensor, b: Tensor, floor: float = 0.0) -> bool:
    """Whether two results agree. A difference smaller than `floor` is rounding noise."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    floor = floor or _noise(a.dtype) * math.sqrt(a.numel())
    finite = a.isfinite() & b.isfinite()
    inner, wanted = a.double()[finite], b.double()[finite]
    same = bool((a[~finite].nan_to_num(0.0) == b[~finite].nan_to_num(0.0)).all())
    return same and float((inner - wanted).norm()) <= max(_TOLERANCE.get(a.dtype, 5e-2) * float(wanted.norm()), floor)


def _noise(dtype: torch.dtype) -> float:
    return 64 * torch.finfo(dtype).eps
