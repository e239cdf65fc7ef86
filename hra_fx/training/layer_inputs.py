"""Run batches with the base model, and collect the main directions of the inputs of each adapted layer.

The input of a layer that is called is the argument of its call. Attention, experts and others read the weight of a
layer; there, the other factor of each matrix product with this weight is the input.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from hra_fx.compat import TorchDispatchMode, conv_border, eager_experts, pytree, tensor_versions, without_peft_adapters
from hra_fx.errors import AdapterError, ConfigError, HRAWarning
from hra_fx.functional.directions import Sketch, merged
from hra_fx.kernels.dispatch import PLAIN
from hra_fx.layers.adapters import get_adapters
from hra_fx.layers.sharding import full_tensor, reshard
from hra_fx.model.example_inputs import normalize_inputs, preserve_rng_state
from hra_fx.model.state import get_state
from hra_fx.model.switch import disable_adapters
from hra_fx.selection.suggestions import some_of
from hra_fx.training.vectors import Vectors, layers_with_vectors

#: The number of patches of an image that are added to a sketch at once.
_PATCHES = 4096
_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.clone.default)
#: Matrix products: the positions of the two factors.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
}


def main_directions(
    function: str,
    model: nn.Module,
    stepped: Sequence[Vectors],
    batches: Iterable[Any] | None,
    directions: int,
    earlier: Mapping[nn.Module, Tensor] = MappingProxyType({}),
) -> dict[nn.Module, Tensor]:
    """Layer with adapters -> the main directions of its inputs, `(d, k)` or `(experts, d, k)`; see `sketches_of`.

    `function` is named in a warning. The directions have the dtype of the vectors that an optimizer updates. The
    directions of a layer start with its `earlier` ones. If `batches` is None, no others are added.

    Raises:
        ConfigError: `directions` is not a positive int, or more than half of the width of a layer.
        AdapterError: `model` is a part of a transformed model; `batches` is empty, or inputs are not finite.

    Warns:
        HRAWarning: some layers have none, so they are not in the result.
    """
    layers = layers_with_vectors(model)
    _check_is_whole(model, layers)
    _check_directions(directions, stepped, earlier, new=batches is not None)
    most = max((one.shape[-1] for one in earlier.values()), default=0)
    found = {} if batches is None else sketches_of(model, layers, batches, most + directions)
    if bad := next((layers[layer] for layer, sketch in found.items() if not sketch.is_finite), None):
        raise AdapterError(f"{bad}: its inputs contain NaN or infinite values, so they have no main directions.")
    dtype = max((one.tensor.dtype for one in stepped), key=lambda one: one.itemsize)
    made: dict[Any, Tensor] = {}  # layers with the same input share one tensor
    bases = dict(earlier)
    for layer, sketch in found.items():
        key = sketch, id(earlier.get(layer))
        if key not in made:
            made[key] = sketch.basis(directions, earlier.get(layer)).to(dtype)
        bases[layer] = made[key]
    bases = {layer: basis for layer, basis in bases.items() if bool(basis.any())}
    seen = bases if batches is None else found.keys() & bases.keys()
    if unseen := [path for layer, path in layers.items() if layer not in seen]:
        text = (
            f"{function}: these layers get no directions from `batches`, because no batch reached them, or because "
            f"another module reads their weights in a way that is not recognized: {some_of(unseen)}."
        )
        warnings.warn(text, HRAWarning, stacklevel=3)
    return bases


def _check_is_whole(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Only the model that was transformed can be run without its adapters."""
    whole = {part for root in model.modules() if get_state(root) is not None for part in root.modules()}
    if any(get_adapters(layer) is not None and layer not in whole for layer in layers):
        raise AdapterError(
            f"{type(model).__name__} is a submodule of a transformed model. Pass the model that was transformed."
        )


def _check_directions(
    directions: Any, stepped: Iterable[Vectors], earlier: Mapping[nn.Module, Tensor], *, new: bool
) -> None:
    """Check the number of directions, with those of earlier calls, for the vectors that an optimizer updates."""
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 1:
        raise ConfigError(f"`directions` must be a positive int, got {directions!r}.")
    for one in stepped:
        total = (directions if new else 0) + (earlier[one.layer].shape[-1] if one.layer in earlier else 0)
        if not one.is_flat and 2 * total > one.tensor.shape[-2]:
            raise ConfigError(
                f"`directions` must be at most half of the width of each layer, got {total} for {one.path} of width "
                f"{one.tensor.shape[-2]}. Pass fewer directions (those of `previous` count too), or exclude the layer."
            )


def sketches_of(
    model: nn.Module, layers: Mapping[nn.Module, str], batches: Iterable[Any], directions: int
) -> dict[nn.Module, Sketch]:
    """Layer -> the sketch of its inputs. Layers with the same inputs share one; a layer without inputs has none.

    The model runs in eval mode without adapters and gradients. A batch is a tensor, a tuple or list of positional
    arguments, or a mapping of keyword arguments.

    Raises:
        AdapterError: `batches` is empty, or a single batch.
    """
    if isinstance(batches, (Mapping, Tensor)):
        raise AdapterError(f"`batches` must be an iterable of batches, got one batch ({type(batches).__name__}).")
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))
    found = _collected(model, layers, batches, directions, device)
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        _merge_processes(found, list(layers), directions, device)
    return found


def _collected(
    model: nn.Module, layers: Mapping[nn.Module, str], batches: Iterable[Any], directions: int, device: torch.device
) -> dict[nn.Module, Sketch]:
    """The sketches of this process."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # which transformers needs

    collector = _Collector(layers, directions)
    is_empty = True
    with _base_model(model), collector:
        for batch in tqdm(batches, desc="main directions", delay=2, leave=False):
            is_empty = False
            if not isinstance(batch, (Tensor, tuple, list, Mapping)):
                raise AdapterError(f"a batch must be a tensor, tuple, list or mapping, got {type(batch).__name__}.")
            collector.last = None, [], None  # a batch may be the same tensor with other values
            call = normalize_inputs(batch)
            args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, call)
            model(*args, **kwargs)
    reshard(model.modules())  # FSDP2 keeps some parameters whole after a forward without a backward pass
    if is_empty:
        raise AdapterError("`batches` is empty. Pass what the model takes, for example a DataLoader.")
    return collector.found()


def _merge_processes(
    found: dict[nn.Module, Sketch], layers: list[nn.Module], directions: int, device: torch.device
) -> None:
    """Merge the sketches of all processes, in place. A process may lack the inputs of some layers, such as experts."""
    # For each layer, the first layer with the same sketch; None if no input reached it.
    own = [
        next((place for place, one in enumerate(layers) if found.get(one) is found[layer]), None)
        if layer in found
        else None
        for layer in layers
    ]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, own)
    # The collectives below need the same sketches in all processes, so then each layer gets its own.
    if any(other != own for other in every):
        for place, layer in enumerate(layers):
            if any(other[place] is not None for other in every):
                known = found.get(layer)
                found[layer] = _sketch_for(layer, directions, device) if known is None else merged([known])
    for sketch in dict.fromkeys(found[layer] for layer in layers if layer in found):
        parts = [copy.copy(sketch) for _ in every]
        for part in parts:
            part.values = torch.empty_like(sketch.values)
        distributed.all_gather([part.values for part in parts], sketch.values.contiguous())
        sketch.values = merged(parts).values
        distributed.broadcast(sketch.values, src=0)  # the processes may round differently


@contextmanager
def _base_model(model: nn.Module) -> Iterator[None]:
    """Context manager in which a model runs in eval mode without its adapters, and is not compiled."""
    modes = {part: part.training for part in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for part, mode in modes.items():
            stack.callback(vars(part).__setitem__, "training", mode)
        stack.callback(model.train, model.training)  # for modules that do more when their mode changes
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        model.eval()
        # The fast path is one operator for the whole attention, so the collector would not see its matrix products.
        torch.backends.mha.set_fastpath_enabled(False)
        for block in (preserve_rng_state(), torch.no_grad(), torch.compiler.set_stance("force_eager")):
            stack.enter_context(block)
        stack.enter_context(eager_experts(model))
        stack.enter_context(without_peft_adapters(model.modules()))
        for root in [part for part in model.modules() if get_state(part) is not None]:
            stack.enter_context(disable_adapters(root))
        yield


class _Part(NamedTuple):
    """A part of the weight of a layer.

    Attributes:
        along: the stride of the input dimension of the weight, which tells it from the output dimension.
        expert: the index of the first expert; `None` for other layers.
    """

    layer: nn.Module
    along: int
    expert: int | None


class _Collector(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the inputs of layers while models run in its context.

    Hooks collect the inputs of layers that are called. The dispatch mode sees all matrix products, and collects the
    inputs of layers whose weights other modules read. A view of a weight has the address of its memory, so weights
    are found by their addresses.
    """

    def __init__(self, layers: Mapping[nn.Module, str], directions: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers
        self.directions = directions
        self.sketches: dict[nn.Module, Sketch] = {}
        #: Layer -> the layers whose sketches contain its inputs.
        self.owners: dict[nn.Module, set[nn.Module]] = {layer: set() for layer in layers}
        #: The input that was added last, its version, and the layer that owns its sketch.
        self.last: tuple[Tensor | None, list[int], Any] = (None, [], None)
        self.inside: list[nn.Module] = []
        self.hooks: list[Any] = []
        #: Address of a weight's memory -> the layers that have it, and the weight.
        self.weights: dict[int, list[tuple[nn.Module, Tensor]]] = defaultdict(list)
        #: Address of the memory of a copy of a weight, which autocast makes -> the copy, and what it is a copy of.
        self.copies: dict[int, tuple[weakref.ref[Tensor], _Part]] = {}

    def __enter__(self) -> Any:
        for layer in self.layers:
            adapters = get_adapters(layer)
            if adapters is None or adapters.reflects_input:  # the input is the argument of a call
                self.hooks.append(layer.register_forward_pre_hook(self._before))
                self.hooks.append(layer.register_forward_hook(self._after, with_kwargs=True))
            if adapters is None:
                continue
            weight = adapters.weight_of(layer)
            if type(weight) in PLAIN and not weight.is_meta:
                self.weights[weight.untyped_storage().data_ptr()].append((layer, weight))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def _before(self, layer: nn.Module, *_: Any) -> None:
        self.inside.append(layer)

    def _after(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        """Add the input of a call. After the call, because an input that the layer rejects is the model's error."""
        x = full_tensor((*args, *kwargs.values())[0])
        base = layer if get_adapters(layer) is not None else layer.get_base_layer()  # of PEFT
        is_convolution = isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        for rows in _patches(x, base) if is_convolution else [x]:
            self.add(layer, rows)
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            first, second = (args[place] for place in _PRODUCTS[func])
            if type(first) in PLAIN and type(second) in PLAIN:
                self._read(second, first)
                self._read(first.mT, second.mT)
        if func in _COPIES and type(args[0]) in PLAIN:
            for part in self._parts(args[0]):
                if args[0].dim() > 1 and part.along in args[0].stride()[-2:]:
                    along = made.stride()[-2:][args[0].stride()[-2:].index(part.along)]
                    copied = weakref.ref(made), part._replace(along=along)
                    self.copies[made.untyped_storage().data_ptr()] = copied
        return made

    def _parts(self, value: Tensor) -> list[_Part]:
        """The weights that a tensor is a part of, or of a copy of it; none during a call of one of their layers."""
        place, start = value.untyped_storage().data_ptr(), value.storage_offset()
        copied, part = self.copies.get(place, (lambda: None, None))
        if part is not None and copied() is not None:
            return [part]
        found = []
        for layer, weight in self.weights.get(place, ()):
            first = start - weight.storage_offset()
            if 0 <= first < weight.numel():
                adapters: Any = get_adapters(layer)
                along = weight.stride(-2 if adapters.fan_in_fan_out else -1)
                found.append(_Part(layer, along, first // weight.stride(0) if weight.dim() == 3 else None))
        return [] if any(part.layer in self.inside for part in found) else found

    def _read(self, factor: Tensor, x: Tensor) -> None:
        """Add `x` if `factor` is a weight, and the product sums over the input dimension of the weight."""
        for layer, along, expert in self._parts(factor):
            adapters: Any = get_adapters(layer)
            if factor.stride(-2) != along or factor.shape[-2] != adapters.width:
                continue
            if expert is None or factor.dim() == 2:
                self.add(layer, x, expert)
            else:
                for place, rows in enumerate(x):
                    self.add(layer, rows, expert + place)

    def add(self, layer: nn.Module, x: Tensor, expert: int | None = None) -> None:
        """Add inputs `(..., d)` of a layer, unless they were just added for another one."""
        seen, version, owner = self.last
        if seen is not x or version != tensor_versions([x]):
            owner = layer
            if owner not in self.sketches:
                self.sketches[owner] = _sketch_for(layer, self.directions, x.device)
            self.sketches[owner].add(x.reshape(-1, x.shape[-1]), expert)
            self.last = x, tensor_versions([x]), owner
        self.owners[layer].add(owner)

    def found(self) -> dict[nn.Module, Sketch]:
        """Layer -> the sketch of its inputs. If it shares some inputs with other layers, all inputs of these count."""
        joint: dict[frozenset[nn.Module], Sketch] = {}
        for owners in map(frozenset, self.owners.values()):
            if owners and owners not in joint:
                joint[owners] = merged([self.sketches[one] for one in self.layers if one in owners])
        return {layer: joint[frozenset(owners)] for layer, owners in self.owners.items() if owners}


def _sketch_for(layer: Any, directions: int, device: torch.device) -> Sketch:
    vectors = next(iter(layer.hra_u.values()))
    experts = vectors.shape[0] if vectors.dim() == 3 else None
    return Sketch(vectors.shape[-2], directions, device, experts)


def _patches(x: Tensor, conv: Any) -> Iterator[Tensor]:
    """The patches `(n, d)` of each image, for all groups."""
    dimensions = len(conv.kernel_size)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x if x.dim() == dimensions + 2 else x[None], conv_border(conv), mode=mode)
    for axis, (size, step, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    x = x.reshape(len(x), conv.groups, -1, *x.shape[2:])  # (n, groups, c, positions..., kernel...)
    for image in x:
        rows = image.movedim(1, 1 + dimensions).flatten(0, dimensions).flatten(1)
        yield from rows.split(_PATCHES)
