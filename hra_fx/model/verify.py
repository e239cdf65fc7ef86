"""`transform(..., verify=True)`: random reflections in the rewritten model against weights that hold them.

Two copies of the model run side by side: one as it was rewritten, the other folded, hence with the Python forward of
the base model. Outputs, buffers and gradients must agree, in train and in eval mode. The gradient of a site's vectors
is compared with that of the whole folded weight, taken back through `W Q`: what reads a weight by a way that no
reflection covers has a gradient there, and none here.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hra_fx.api.fold import fold
from hra_fx.compat import pytree
from hra_fx.errors import HRAError, HRAWarning, UnsupportedLayerError, VerificationError
from hra_fx.functional import householder
from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.quantized.detect import packing_of
from hra_fx.model.example_inputs import Call, fresh, random_kept, seed_all
from hra_fx.model.state import sites_of

_SEED = 20240517
_GRADIENT = "gradient of input "
#: How far two results may be apart, relative to the norm of one.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
_COARSE = 5e-2


class _Passage(NamedTuple):
    """One call of a region or of a layer alone."""

    path: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class _Run(NamedTuple):
    """What one forward and backward of a copy left, by name."""

    results: dict[str, Tensor]
    passages: list[_Passage]


def _check_floating(model: nn.Module) -> None:
    for path, layer in model.named_modules():
        if packing := packing_of(layer):
            raise UnsupportedLayerError(
                f"{path}: it is quantised ({packing.words(layer)}), so that there is no folded model to compare with: "
                "a fold would quantise anew. Leave verify out, or verify the model before quantisation."
            )


def check_against_folded(model: nn.Module, call: Call) -> None:
    """Compare a transformed model with its folded self, on copies, in float64 where it runs in that, else in float32.

    Args:
        model: a transformed model; it is not run and not changed, and takes three times its memory meanwhile.
        call: positional and keyword arguments of one call.

    Raises:
        UnsupportedLayerError: the model has quantised layers.
        VerificationError: naming the mode, what differs, and the first region in which it does.
    """
    _check_floating(model)
    with random_kept():
        # In float64 no rounding tips a choice (the top experts) that both copies have to make.
        for dtype in (torch.float64, torch.float32, None):
            adapted, folded, inputs = _copies(model, call, dtype)
            reason = _why_not(folded, inputs)
            if reason is None:
                break
        else:
            raise VerificationError(
                f"example_inputs: {type(model).__name__} without its reflections does not run on them ({reason}). "
                "Give inputs that the base model takes."
            )
        for training in (True, False):
            _compare(adapted, folded, inputs, training)


def _copies(model: nn.Module, call: Call, dtype: torch.dtype | None) -> tuple[nn.Module, nn.Module, Call]:
    """A copy with random vectors, a folded copy of that, and inputs for both."""
    adapted = copy.deepcopy(model).requires_grad_(False)
    if dtype is not None:
        # Complex buffers (frequencies of a rotation) would lose their imaginary part by Module.to.
        adapted._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for vectors in _vectors(adapted):
            vectors.copy_(torch.randn(vectors.shape, generator=generator))
            vectors.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HRAWarning)
        folded = fold(copy.deepcopy(adapted))
    for parameter in folded.parameters():
        parameter.requires_grad_(parameter.is_floating_point())

    def cast(value: Any) -> Any:
        return value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value

    return adapted, folded, pytree.tree_map(cast, call)


def _vectors(model: nn.Module) -> Iterator[nn.Parameter]:
    for layer in sites_of(model).values():
        yield from (layer.hra_u[name] for name in layer.hra_u.active)


def _why_not(folded: nn.Module, call: Call) -> str | None:
    twin = copy.deepcopy(folded).eval()
    args, kwargs = fresh(call)
    try:
        twin(*args, **kwargs)
    except Exception as error:  # whatever the model's own code makes of the inputs
        return _said(error)
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _compare(adapted: nn.Module, folded: nn.Module, call: Call, training: bool) -> None:
    """One call of both copies in one mode."""
    sites = sites_of(adapted)
    watched = [*sites, ""]
    # Buffers and gradients change, so each mode starts from copies of its own.
    twins = [copy.deepcopy(module) for module in (adapted, folded)]
    mode = "train" if training else "eval"
    ours, theirs = _run_both(twins, call, training, watched)
    names = {**theirs.results, **ours.results}
    for name in (name for name in names if not name.startswith(_GRADIENT)):
        _compare_results(name, ours, theirs, mode)
    gradients = [parameter.grad for parameter in twins[1].parameters() if parameter.grad is not None]
    largest = max((float(gradient.norm()) for gradient in gradients), default=0.0)
    for path in sites:
        _compare_gradient(path, twins[0].get_submodule(path), twins[1].get_submodule(path), mode, largest)
    # The gradient of a site says more than that of an input.
    for name in (name for name in names if name.startswith(_GRADIENT)):
        _compare_results(name, ours, theirs, mode, floor=largest * _noise(names[name].dtype) * 1e3)


def _run_both(twins: list[nn.Module], call: Call, training: bool, watched: list[str]) -> tuple[_Run, _Run]:
    mode, kind = "train" if training else "eval", type(twins[1]).__name__
    with_inputs = _takes_gradients(twins[1], call)
    try:
        theirs = _run(twins[1], call, training, watched, with_inputs=with_inputs)
    except Exception as error:  # whatever the model's own code makes of the inputs
        raise VerificationError(
            f"example_inputs: in {mode} mode {kind} without its reflections does not run on them "
            f"({_said(error)}). Give inputs that the base model takes in both modes."
        ) from error
    try:
        ours = _run(twins[0], call, training, watched, with_inputs=with_inputs)
    except HRAError:  # a weight that is read unseen
        raise
    except Exception as error:
        raise VerificationError(
            f"the model: in {mode} mode the rewritten one does not run, and the folded one does ({_said(error)}). The "
            "rewrite would be wrong, and was taken back. Please report the model."
        ) from error
    if "output 0" not in theirs.results:
        raise VerificationError(
            f"example_inputs: in {mode} mode {kind} gives no floating-point tensor for them, so there "
            "is nothing to compare. Give inputs for which it does, or leave verify out."
        )
    return ours, theirs


def _compare_results(name: str, ours: _Run, theirs: _Run, mode: str, floor: float | None = None) -> None:
    if not _close(ours.results.get(name), theirs.results.get(name), floor):
        where = _first_difference(ours.passages, theirs.passages)
        raise VerificationError(
            f"{where or 'the model'}: in {mode} mode {name} of the rewritten model is not that of the folded one. "
            f"The rewrite would be wrong, and was taken back. Leave the layers of {where or 'the model'} out with "
            "exclude_modules, and please report the model."
        )


def _takes_gradients(folded: nn.Module, call: Call) -> bool:
    """Whether inputs may have gradients: some models ask for those of what they make of their inputs."""
    twin = copy.deepcopy(folded).train()
    try:
        _run(twin, call, True, [], with_inputs=True)
    except Exception:  # whatever the model's own code makes of them
        return False
    return True


def _run(module: nn.Module, call: Call, training: bool, watched: list[str], *, with_inputs: bool) -> _Run:
    """Forward and backward, from the same random numbers each time."""
    passages: list[_Passage] = []
    for path in watched:
        module.get_submodule(path).register_forward_hook(_recorder(path, passages), with_kwargs=True)
    call = fresh(call)
    inputs = [leaf.requires_grad_() for leaf in _floating(call)] if with_inputs else []
    # No leaves, for a forward may write into what it is given.
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)
    seed_all(_SEED)
    outputs = _floating(module.train(training)(*args, **kwargs))
    generator = torch.Generator().manual_seed(_SEED)
    # Drawn for each output, for those that have a gradient are more in the folded model.
    terms = [(out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs]
    if terms := [term for term in terms if term.requires_grad]:
        torch.stack([term.to(terms[0]) for term in terms]).sum().backward()  # type: ignore[no-untyped-call]
    results = {f"output {place}": out.detach() for place, out in enumerate(outputs)}
    results |= {f"buffer {name}": value for name, value in module.named_buffers() if "hra_u" not in name}
    gradients = ((place, leaf.grad) for place, leaf in enumerate(inputs))
    results |= {f"{_GRADIENT}{place}": grad for place, grad in gradients if grad is not None}
    return _Run(results, passages)


def _recorder(path: str, passages: list[_Passage]) -> Any:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        passages.append(_Passage(path, _copied((args, kwargs)), _copied(output)))

    return record


def _copied(tree: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in _floating(tree)]


def _floating(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if dataclasses.is_dataclass(leaf):
            found += _floating([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        elif isinstance(leaf, Tensor) and leaf.is_floating_point():
            found.append(leaf)
    return found


def _first_difference(ours: list[_Passage], theirs: list[_Passage]) -> str | None:
    """The first module, by the time at which it is done, that makes something else of the same inputs."""
    for mine, due in zip(ours, theirs, strict=False):
        if mine.path == due.path and _all_close(mine.inputs, due.inputs) and not _all_close(mine.outputs, due.outputs):
            return mine.path
    return None


def _compare_gradient(path: str, adapted: nn.Module, folded: nn.Module, mode: str, largest: float) -> None:
    """The gradient of a site's vectors, against that of its folded weight taken back through `W Q`.

    `largest` is the norm of the model's largest gradient, beside which another may be rounding noise.
    """
    if not isinstance(adapted, SiteCarrier) or not adapted.hra_u.active:
        return
    reflection = adapted.hra_u
    whole = reflection.weight_of(folded).grad
    vectors = [reflection[name] for name in reflection.active]
    chain = reflection.active_chain(torch.float64)
    if whole is None or chain is None:
        return
    weight = reflection.rows(adapted.hra_base.double())
    rotated = householder.rotate(weight, chain, householder.compact_wy(chain))
    due = torch.autograd.grad(rotated, vectors, reflection.rows(whole).double())
    for name, vector, gradient in zip(reflection.active, vectors, due, strict=True):
        mine = torch.zeros_like(vector) if vector.grad is None else vector.grad
        if not _close(mine, gradient.to(mine), floor=largest * _noise(whole.dtype) * 1e3):
            what = "is missing" if vector.grad is None else "is wrong"
            raise VerificationError(
                f"{path}: in {mode} mode the gradient of its vectors {name!r} {what}. The rewrite would be wrong, and "
                "was taken back. Leave the layer out with exclude_modules, and please report the model."
            )


def _all_close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(_close(a, b) for a, b in itertools.zip_longest(ours, theirs))


def _close(a: Tensor | None, b: Tensor | None, floor: float | None = None) -> bool:
    """Whether two results agree; below `floor`, by default that of numbers about 1, they are rounding noise."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    if floor is None:
        floor = _noise(a.dtype) * math.sqrt(a.numel())
    finite = a.isfinite() & b.isfinite()
    allowed = _TOLERANCE.get(a.dtype, _COARSE)
    inner, due = a.double()[finite], b.double()[finite]
    same = bool((a[~finite].nan_to_num(0.0) == b[~finite].nan_to_num(0.0)).all())
    return same and float((inner - due).norm()) <= max(allowed * float(due.norm()), floor)


def _noise(dtype: torch.dtype) -> float:
    return 64 * torch.finfo(dtype).eps
