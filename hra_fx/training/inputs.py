"""Run samples through a base model, and collect the inputs of its adapted layers.

The inputs of a layer are the other factors in the products with its weight, also if another module computes them, as
attention and experts do. The input of a quantized layer, or of a `Conv1D` of transformers, is the argument of its call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode

from hra_fx.compat import eager_experts, pytree
from hra_fx.errors import AdapterError
from hra_fx.example_inputs import Call, device_of, preserve_rng_state
from hra_fx.functional.directions import Sketch
from hra_fx.functional.rotate import widest_dtype
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.linear import LinearAdapters
from hra_fx.layers.sharding import full_tensor, is_sharded, reshard
from hra_fx.training.without_adapters import without_adapters

T = TypeVar("T")
#: The number of patches of an image that are added to a sketch at once.
_PATCHES = 4096
#: Names of matrix products -> whether they take a weight `(in, out)`.
_PRODUCTS = {"linear": False, "matmul": True, "__matmul__": True, "bmm": True}
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def sketches_of(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], calls: Iterable[Call], directions: int
) -> dict[str, Sketch]:
    """Path -> the sketch of the inputs of a layer in all processes; without layers that no input reached.

    The model runs in eval mode without adapters and gradients.

    Raises:
        AdapterError: `calls` is empty in some process.
    """
    device = device_of(model)
    collector = _Collector(layers, directions)
    count = 0
    eager = torch.compiler.set_stance("force_eager")
    with without_adapters(model), preserve_rng_state(), eager, eager_experts(model), collector:
        for call in _in_step(model, calls, collector):
            count += 1
            args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, call)
            model(*args, **kwargs)
    reshard(model.modules())  # FSDP2 keeps some parameters whole after a forward without a backward pass
    counts = _in_all_processes(count)
    if not min(counts):
        where = " in this process or another one" if len(counts) > 1 else ""
        raise AdapterError(f"`samples` is empty{where}. Pass what the model takes, for example a DataLoader.")
    if len(counts) > 1:
        collector.merge_processes(len(counts), device)
    unknown = set().union(*_in_all_processes({collector.paths[layer] for layer in collector.unknown}))
    return {path: one for path, one in collector.sketches.items() if path not in unknown and bool(one.energy != 0)}


def _in_step(model: nn.Module, calls: Iterable[Call], collector: _Collector) -> Iterator[Call]:
    """The calls with a progress bar. With FSDP2, processes with fewer calls repeat them, but do not collect."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # which transformers needs

    if not is_sharded(model):
        yield from tqdm(calls, desc="main directions", delay=2, leave=False)
        return
    own = list(calls)
    counts = _in_all_processes(len(own))
    for number in range(max(counts) if min(counts) else 0):  # without calls, a process would wait for the others
        collector.is_on = number < len(own)
        yield own[number % len(own)]


def _in_all_processes(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if not distributed.is_available() or not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


class _Collector(TorchFunctionMode):
    """Collects the inputs of layers while models run in its context.

    While such a mode is on, attention does not use its fast path, which is one operator.

    Attributes:
        sketches: path -> the sketch of the inputs of a layer.
        called: the layers whose inputs are the arguments of their calls.
        running: those of them that run now.
        unknown: layers whose weight is used in a way that is not known, so that its other factors are not either.
        is_on: whether inputs are collected.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer], directions: int) -> None:
        super().__init__()
        self.paths = {layer: path for path, layer in layers.items()}
        self.directions = directions
        self.sketches: dict[str, Sketch] = {}
        self.called = [layer for layer in self.paths if _is_called(layer)]
        self.running: list[AdaptedLayer] = []
        self.unknown: set[AdaptedLayer] = set()
        self.is_on = True
        self.hooks: list[Any] = []

    def __enter__(self) -> Any:
        self.hooks = [layer.register_forward_hook(self._call, with_kwargs=True) for layer in self.called]
        self.hooks += [layer.register_forward_pre_hook(self._start) for layer in self.called]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def _start(self, layer: Any, _: Any) -> None:
        self.running.append(layer)

    def _call(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        """Add the input of a call. After the call, because an input that the layer rejects is the model's error."""
        self.running.pop()
        self.add(layer, (*args, *kwargs.values())[0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        made = func(*args, **kwargs)
        used = [use for use in map(self._use_of, pytree.tree_leaves((args, kwargs))) if use is not None]
        # Such as a dtype, or what accelerate does with weights that it offloads.
        if not used or all(leaf.is_meta for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)):
            return made
        layer, expert = used[0]
        x, weight = (*args, *kwargs.values(), None)[:2]
        is_last = len(used) == 1 and self._use_of(weight) is not None and layer not in self.called
        if name == "__getitem__" and expert is None and args[0].dim() == 3 and made.dim() == 2:
            made.hra_expert = layer, int(args[1])
        elif name in _PRODUCTS and is_last and layer.hra_u.fan_in_fan_out is _PRODUCTS[name]:
            of_all = weight.dim() == 3  # a product for each expert
            for place, rows in enumerate(x if of_all else [x]):
                self.add(layer, rows, place if of_all else expert)
        elif name in _CONVOLUTIONS and is_last:
            for rows in _patches(func, *args, **kwargs):
                self.add(layer, rows)
        else:
            self.unknown |= {layer for layer, _ in used} - {*self.running}
        return made

    def _use_of(self, leaf: Any) -> tuple[Any, int | None] | None:
        """The layer whose weight an argument is, and its expert, if it is the weight of one."""
        if not isinstance(leaf, Tensor):
            return None
        layer = self._layer_of(leaf)
        return getattr(leaf, "hra_expert", None) if layer is None else (layer, None)

    def _attention(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Add the inputs of both weights of `nn.MultiheadAttention`: the second one is the output without it."""
        layer = self._layer_of(args[5])
        for x in {id(x): x for x in args[:3]}.values() if layer is not None else ():
            self.add(layer, x)
        weight, bias = args[11:13]
        if (layer := self._layer_of(weight)) is None:
            return func(*args, **kwargs)
        x, scores = func(*args[:11], torch.eye(len(weight)).to(weight), None, *args[13:], **kwargs)
        self.add(layer, x)
        return F.linear(x, weight, bias), scores

    def _layer_of(self, weight: Any) -> Any:
        """The layer with this parameter. Looked up each time, because FSDP2 and others replace parameters."""
        if not isinstance(weight, nn.Parameter):
            return None
        return next((layer for layer in self.paths if layer.hra_u.weight_of(layer) is weight), None)

    def add(self, layer: Any, x: Tensor, expert: int | None = None) -> None:
        """Add inputs `(..., d)` of a layer, or of one of its experts."""
        if self.is_on:
            rows = full_tensor(x).reshape(-1, x.shape[-1])
            self._sketch_of(layer, x.device).add(rows, expert)

    def _sketch_of(self, layer: Any, device: torch.device) -> Sketch:
        made = Sketch(layer.hra_u.width, self.directions, device, getattr(layer.hra_u, "experts", None))
        return self.sketches.setdefault(self.paths[layer], made)

    def merge_processes(self, count: int, device: torch.device) -> None:
        """Merge the sketches of all processes. A process may lack the inputs of some layers, such as experts."""
        for layer in self.paths:
            sketch = self._sketch_of(layer, device)
            every = []
            for own in (sketch.values, sketch.energy):
                every.append([torch.empty_like(own) for _ in range(count)])
                distributed.all_gather(every[-1], own)
            sketch.merge(*map(torch.stack, every))
            for merged in (sketch.values, sketch.energy):
                distributed.broadcast(merged, src=0)  # the processes may round differently


def _is_called(layer: Any) -> bool:
    """Whether a layer has a forward of its library that does not compute with its weight as it is."""
    adapters: Any = layer.hra_u
    return isinstance(adapters, LinearAdapters) and (type(adapters) is not LinearAdapters or adapters.fan_in_fan_out)


def _patches(
    convolve: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[Tensor]:
    """The patches `(n, d)` of each image and group: the outputs of the convolution for the unit vectors as weights."""
    dtype = widest_dtype(input.device)
    units = torch.eye(weight[0].numel(), dtype=dtype, device=input.device).view(-1, *weight.shape[1:])
    for image in input.reshape(-1, weight.shape[1], *input.shape[2 - weight.dim() :]):
        made = convolve(image[None].to(dtype), units, None, stride, padding, dilation)
        yield from made[0].flatten(1).mT.split(_PATCHES)
