"""Memory and communication of adapters in distributed training, computed from a model on the meta device.

Communication is counted for ring algorithms: for `S` bytes over `n` processes, each process sends `S (n - 1) / n` in an
all-gather or a reduce-scatter, and twice as much in an all-reduce. The communication of the base model is not included.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.model.state import require_adapted_layers

Strategy = Literal["ddp", "fsdp2", "zero3", "tp"]
#: Default sizes in bytes of the first and of the other buckets in which DDP reduces gradients.
_BUCKETS = (1 << 20, 25 << 20)
_FLOAT = 4
#: AdamW keeps two values per parameter.
_MOMENTS = 2


@dataclass(frozen=True)
class Cost:
    """The cost of the adapters of one method for one process: the process with the largest shards."""

    method: str  # "HRA" or "LoRA"
    rank: int  # `r`, the largest of all layers
    parameters: int  # trained parameters of the whole model
    vectors: int  # bytes of the parameters and anchors that this process has between steps
    gradients: int  # bytes of their gradients
    optimizer: int  # bytes of AdamW's two moments
    factors: int  # bytes of `R` and `F`, which exist from the forward to the backward pass; 0 for LoRA
    collectives: int  # collectives per step that contain data of adapters, possibly together with other data
    sent: int  # bytes that this process sends per step for adapters


class _Tensor(NamedTuple):
    """A trained tensor: its first dimension, which is sharded, the size of the other dimensions, and its layer.

    `style` is the style of tensor parallelism that splits it, if there is one.
    """

    rows: int
    columns: int
    path: str
    style: str = ""

    def nbytes(self, parts: int = 1) -> int:
        """The size in bytes of the largest chunk."""
        return math.ceil(self.rows / parts) * self.columns * _FLOAT


def costs(model: nn.Module, gpus: int, strategy: Strategy, *, tokens: int = 4096) -> list[Cost]:
    """Compute the cost of a model's adapters, of LoRA with the same rank, and of LoRA with about as many parameters.

    Args:
        model: a transformed model with float32 vectors; it may be on the meta device.
        gpus: number of processes.
        strategy: `"ddp"`; `"fsdp2"`, `fully_shard` of each block and of the model; `"zero3"`, `fully_shard` of each
            adapted layer; or `"tp"`, tensor parallelism with the plan of a transformers model.
        tokens: tokens per step and process, for the activations that tensor parallelism sums.

    Raises:
        AdapterError: the model does not have adapters, or does not have a plan for tensor parallelism.

    Example:
        >>> import torch
        >>> from hra_fx import HRAConfig, transform
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(64, 32))
        >>> hra, lora, _ = costs(transform(model, HRAConfig(r=8, target_modules=["0"])), 4, "ddp")
        >>> hra.parameters, hra.sent, lora.parameters, lora.sent
        (512, 3072, 768, 4608)
    """
    layers = require_adapted_layers(model)
    tensors = [(path, tensor) for path, layer in layers.items() for tensor in layer.hra_u.parameters()]
    vectors = [_Tensor(len(tensor), tensor[0].numel(), path) for path, tensor in tensors]
    anchors = sum(buffer.nbytes for layer in layers.values() for buffer in layer.hra_u.buffers())
    sizes = [(layer, math.prod(layer.hra_u.vectors_shape(1)) * layer.hra_base.itemsize) for layer in layers.values()]
    factors = sum(2 * _length(layer) * size for layer, size in sizes)
    ranks = {path: max(spec.r for spec in layer.hra_u.specs.values()) for path, layer in layers.items()}
    per_rank = sum(t.rows * t.columns for t in _lora(layers, dict.fromkeys(ranks, 1)))
    equal = max(1, round(sum(t.rows * t.columns for t in vectors) / per_rank))
    return [
        _cost("HRA", vectors, ranks, model, gpus, strategy, tokens, anchors=anchors, factors=factors),
        *(
            _cost("LoRA", _lora(layers, own), own, model, gpus, strategy, tokens)
            for own in (ranks, dict.fromkeys(ranks, equal))
        ),
    ]


def _cost(
    method: str,
    tensors: list[_Tensor],
    ranks: Mapping[str, int],
    model: nn.Module,
    gpus: int,
    strategy: Strategy,
    tokens: int,
    anchors: int = 0,
    factors: int = 0,
) -> Cost:
    if strategy == "ddp":
        here = sum(t.nbytes() for t in tensors)
        collectives, sent = _replicated(tensors, anchors, gpus)
    elif strategy == "tp":
        style_of = _styles(model)
        here = sum(t.nbytes() // (gpus if t.style and t.style in style_of(t.path) else 1) for t in tensors)
        collectives, sent = _split(method, ranks, model, gpus, tokens)
    else:
        here = sum(t.nbytes(gpus) for t in tensors)
        collectives, sent = _sharded(tensors, model, gpus, each_layer=strategy == "zero3")
    parameters = sum(t.rows * t.columns for t in tensors)
    rank = max(ranks.values())
    return Cost(method, rank, parameters, here + anchors, here, _MOMENTS * here, factors, collectives, sent)


def _replicated(tensors: list[_Tensor], anchors: int, gpus: int) -> tuple[int, int]:
    """DDP: an all-reduce for each bucket of gradients. Anchors are buffers, which the first process broadcasts."""
    sizes, buckets, held = [t.nbytes() for t in reversed(tensors)], 0, 0
    for size in sizes:
        held += size
        if held >= _BUCKETS[bool(buckets)]:
            buckets, held = buckets + 1, 0
    reduced = 2 * sum(sizes) * (gpus - 1) // gpus
    return buckets + bool(held) + bool(anchors), reduced + anchors


def _sharded(tensors: list[_Tensor], model: nn.Module, gpus: int, *, each_layer: bool) -> tuple[int, int]:
    """FSDP2: a unit is gathered for the forward and (except the root) for the backward; gradients are scattered."""
    unit_of: Callable[[str], str] = (lambda path: path) if each_layer else _blocks(model)
    shards: dict[str, int] = defaultdict(int)
    for t in tensors:
        shards[unit_of(t.path)] += t.nbytes(gpus)
    times = {unit: 3 if unit else 2 for unit in shards}
    return sum(times.values()), (gpus - 1) * sum(times[unit] * size for unit, size in shards.items())


def _split(method: str, ranks: Mapping[str, int], model: nn.Module, gpus: int, tokens: int) -> tuple[int, int]:
    """Tensor parallelism, without the collectives of the base model.

    Row-wise: `k` numbers per token are reduced in the forward and in the backward pass, and the gradients of `R` and
    `F` are gathered. LoRA reduces `r` numbers per token in the forward pass. Column-wise: LoRA reduces the gradient of
    `A`, or the gradient of its output if there are fewer tokens.
    """
    style_of = _styles(model)
    collectives = sent = 0
    for path, layer in require_adapted_layers(model).items():
        style = style_of(path)
        d, k, size = layer.hra_u.width, _length(layer), layer.hra_base.itemsize
        if method == "HRA":
            times, width, gathered = 2 * ("rowwise" in style), tokens * k, 2 * d * k if "rowwise" in style else 0
        else:
            times, gathered = int("rowwise" in style or "colwise" in style), 0
            width = (tokens if "rowwise" in style else min(tokens, d)) * ranks[path]
        collectives += times + bool(gathered)
        sent += (times * 2 * width + gathered) * size * (gpus - 1) // gpus
    return collectives, sent


def _styles(model: nn.Module) -> Callable[[str], str]:
    """Path -> style in the plan of a transformers model. The plan has ends of paths, with `*` for block indices."""
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise AdapterError(
            f"{type(model).__name__} has no plan for tensor parallelism (`tp_plan`). Use another strategy."
        )
    patterns = {r"(.*\.)?" + re.escape(name).replace(r"\*", r"\d+"): style for name, style in plan.items()}
    return lambda path: next((style for pattern, style in patterns.items() if re.fullmatch(pattern, path)), "")


def _blocks(model: nn.Module) -> Callable[[str], str]:
    """Path -> the block that contains it: a child of the outermost list of modules; `""` for the root."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]

    def block_of(path: str) -> str:
        inside = next((f"{place}." for place in outermost if path.startswith(f"{place}.")), None)
        return "" if inside is None else inside + path.removeprefix(inside).partition(".")[0]

    return block_of


def _lora(layers: Mapping[str, AdaptedLayer], ranks: Mapping[str, int]) -> list[_Tensor]:
    """`A: (r, d)` and `B: (out, r)` of each layer; for experts, one tensor for all experts."""
    found = []
    for path, layer in layers.items():
        experts, d = math.prod(layer.hra_u.vectors_shape(1)) // layer.hra_u.width, layer.hra_u.width
        out = layer.hra_base.numel() // d // experts
        rank = experts * ranks[path]
        found += [_Tensor(rank, d, path, "rowwise"), _Tensor(out, rank, path, "colwise")]
    return found


def _length(layer: AdaptedLayer) -> int:
    """The number `k` of vectors of all adapters of a layer, including anchors."""
    return sum(tensor.shape[-1] for tensor in (*layer.hra_u.parameters(), *layer.hra_u.buffers()))
