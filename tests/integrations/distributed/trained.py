"""Small models with adapters, their batches, and a training of which each process takes a part of every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import tiny
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import hra_fx

F64 = torch.float64
SMALL: dict[str, Any] = tiny.SMALL | {"vocab_size": 19, "initializer_range": 0.02}
ONE_HEAD = {"num_key_value_heads": 1, "use_cache": False}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def convolutions() -> nn.Module:
    first, second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, groups=2)
    return nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Attention(nn.Module):
    """Its projections are read functionally, so that their weights are what is reflected."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attn(x, x, x)[0])


llama = partial(tiny.llama, **SMALL, **ONE_HEAD)


def checkpointed() -> nn.Module:
    model = llama()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def vectors(count: int) -> Tensor:
    return torch.randn(count, 8, dtype=F64)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=F64)


def sequences(count: int) -> Tensor:
    return torch.randn(count, 5, 8, dtype=F64)


def tokens(count: int) -> Tensor:
    return torch.randint(0, 19, (count, 6))


@dataclass(frozen=True)
class Case:
    """A model, what its adapter is, its batch, and the parts that FSDP2 shards by themselves."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Tensor]
    config: Mapping[str, Any]
    units: tuple[str, ...]
    dtype: torch.dtype = F64

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(self.dtype)

    def model(self) -> nn.Module:
        return adapted(self.base(), self)

    def data(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(2)
        return self.batch(8), torch.randint(0, 3, (8,))


def adapted(base: nn.Module, case: Case) -> nn.Module:
    """A base model with vectors off their start, the same in every process and on every device."""
    torch.manual_seed(1)
    model = hra_fx.transform(base, hra_fx.HRAConfig(**{"r": 4, **case.config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hra_u." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=F64).to(parameter))
    return model


LAYERS = ("model.layers.0", "model.layers.1")
PROJECTIONS = {"target_modules": ["q_proj", "v_proj", "up_proj", "gate_proj", "down_proj"]}
CASES: dict[str, Case] = {
    "mlp, whole": Case(mlp, vectors, {"target_modules": ["0", "2", "4"]}, ("0", "2")),
    "mlp, odd rank": Case(mlp, vectors, {"r": 3, "target_modules": ["0", "2"]}, ("0", "2")),
    "mlp, Gram-Schmidt": Case(mlp, vectors, {"apply_GS": True, "target_modules": ["0", "2"]}, ("0",)),
    "mlp, copies": Case(
        mlp, vectors, {"target_modules": ["0", "2"], "modules_to_save": ["4"], "bias": "all"}, ("0", "2")
    ),
    "convolutions": Case(convolutions, images, {"target_modules": ["0", "2", "5"]}, ("0", "2")),
    "attention": Case(Attention, sequences, {"target_modules": ["attn", "attn.out_proj", "head"]}, ("attn", "head")),
    "llama": Case(llama, tokens, PROJECTIONS, LAYERS),
    "llama, checkpointing": Case(checkpointed, tokens, PROJECTIONS, LAYERS),
    "bert": Case(
        partial(tiny.bert, **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3),
        tokens,
        {"target_modules": ["query", "key", "dense"], "modules_to_save": ["classifier"]},
        ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    ),
}

EXPERTS = Case(
    partial(tiny.mixtral, **SMALL, **ONE_HEAD, num_local_experts=2, experts_implementation="eager"),
    tokens,
    {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    LAYERS,
)


def shard(model: nn.Module, units: Iterable[str] = ()) -> nn.Module:
    for unit in units:
        fully_shard(model.get_submodule(unit))
    return fully_shard(model)


def sites(model: nn.Module) -> tuple[str, ...]:
    """The layers themselves, the inner ones first; what another module reads functionally cannot be sharded alone."""
    paths = [path.removesuffix(".hra_u") for path, _ in model.named_modules() if path.endswith(".hra_u")]
    return tuple(path for path in paths if not path.endswith("out_proj"))


def kept_whole(case: Case, model: nn.Module) -> nn.Module:
    """FSDP2 that leaves parameters as they are between forward and backward."""
    fully_shard(model.get_submodule(case.units[0]), reshard_after_forward=False)
    return fully_shard(model, reshard_after_forward=False)


def with_vectors_apart(case: Case, model: nn.Module, *, reshard_after_forward: bool = False) -> nn.Module:
    """FSDP2 with all vectors in one group, which the root gathers at the start of its forward."""
    boxes = [part for path, part in model.named_modules() if path.endswith(".hra_u")]
    fully_shard(boxes, reshard_after_forward=reshard_after_forward)
    return shard(model, case.units)


#: How a model is shared among processes.
WAYS: dict[str, Callable[[Case, nn.Module], nn.Module]] = {
    "DDP": lambda case, model: DistributedDataParallel(model),
    "FSDP2, whole": lambda case, model: shard(model),
    "FSDP2, parts": lambda case, model: shard(model, case.units),
    "FSDP2, every layer": lambda case, model: shard(model, sites(model)),
    "FSDP2, kept whole": kept_whole,
    "FSDP2, vectors apart": with_vectors_apart,
    "FSDP2, vectors apart, gathered again": partial(with_vectors_apart, reshard_after_forward=True),
}


def loss_of(output: Any, labels: Tensor) -> Tensor:
    logits = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits[:, -1, :3] if logits.dim() == 3 else logits, labels)


def train(
    model: nn.Module,
    case: Case,
    part: slice = slice(None),
    steps: int = 3,
    term: Callable[..., Any] | None = None,
    evaluate: bool = False,
    protect: int = 0,
    optimizer: Any = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> list[float]:
    """The losses of whole batches, of which this process takes a part.

    With a term, an additional loss of the model; with `evaluate`, each step comes after a call without gradients.
    """
    x, labels = case.data()
    for module in model.modules():  # after a forward without backward, parameters() gives what is thrown away
        if isinstance(module, FSDPModule):
            module.reshard()
    if optimizer is None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    if protect:
        kept = hra_fx.protect(model, [x[part]], 1)
        hra_fx.protect(model, [x[part]], protect - 1, kept)
    losses = []
    for _ in range(steps):
        if evaluate:
            output(model, case)
        loss = loss_of(model(x[part]), labels[part])
        backward(loss if term is None else loss + term(model))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if part != slice(None):
            distributed.all_reduce(mean)
            mean /= distributed.get_world_size()
        losses.append(float(mean))
    return losses


def part_of(rank: int) -> slice:
    return slice(rank, None, distributed.get_world_size())


def trained(model: nn.Module) -> dict[str, Tensor]:
    """All that is trained, whole, by the names of the bare model."""
    found = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in found.items()}


def output(model: nn.Module, case: Case) -> Tensor:
    with torch.no_grad():
        found = model(case.data()[0])
    logits: Tensor = getattr(found, "logits", found)
    return logits


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], within: float = 1e-13) -> None:
    assert left.keys() == right.keys()
    assert all((left[name] - right[name]).abs().max() < within for name in left)


def close(left: Tensor, right: Tensor, within: float = 1e-9) -> bool:
    return bool((left.cpu() - right.cpu()).abs().max() < within)
