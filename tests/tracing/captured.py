"""Models of each kind, with calls in several sizes, in eager and in graph mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import moe_models
import tiny_models
import torch
import transformers
from adapting import randomise
from graph_modules import Cnn, Mlp, config, graph_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tracing.models import Images, Reads, Shared

import hra_fx

SIZES = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
llama = partial(tiny_models.llama, **SIZES)
bert = partial(tiny_models.bert, **SIZES)


@dataclass
class Case:
    """A model, what is adapted, and the arguments of calls with a batch and another size.

    Without sizes of an example, torch.fx alone makes the graph; `traced`: before the model is adapted.
    """

    make: Callable[[], nn.Module]
    fields: dict[str, Any]
    call: Callable[[int, int], dict[str, Any]]
    example: tuple[int, int] | None = (2, 5)
    others: tuple[tuple[int, int], ...] = ((3, 7), (1, 4))
    traced: bool = False


def tokens(batch: int, length: int) -> dict[str, Any]:
    ids = torch.randint(0, 16, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labeled(batch: int, length: int) -> dict[str, Any]:
    return tokens(batch, length) | {"labels": torch.randint(0, 16, (batch, length))}


def classified(batch: int, length: int) -> dict[str, Any]:
    return tokens(batch, length) | {"labels": torch.randint(0, 2, (batch,))}


def images(name: str, size: int, channels: int, batch: int, _: int) -> dict[str, Any]:
    return {name: torch.randn(batch, channels, size, size)}


def rows(batch: int, _: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 6)}


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


#: torch.fx traces Reads and Shared, and torch.export captures the others.
CASES = {
    "llama": Case(llama, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}, labeled, example=(1, 5)),
    "bert": Case(bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": "hra_only"}, classified),
    "resnet": Case(
        resnet,
        {"target_modules": ".*convolution", "modules_to_save": ["classifier"]},
        partial(images, "pixel_values", 16, 3),
    ),
    "images": Case(
        Images, {"target_modules": ["conv", "attention", "attention.out_proj", "head"]}, partial(images, "x", 3, 2)
    ),
    "reads": Case(Reads, {"target_modules": ["first", "second"]}, rows),
    "shared": Case(Shared, {"target_modules": ["first", "inner"], "apply_GS": True}, rows),
    "mlp, traced": Case(Mlp, {"target_modules": ["first", "second"]}, rows, traced=True),
    "cnn, traced": Case(Cnn, {"target_modules": ["conv", "grouped", "first"]}, partial(images, "x", 8, 3), traced=True),
    "experts": Case(
        partial(moe_models.built, "mixtral", implementation="batched_mm"), {"target_parameters": ["down_proj"]}, tokens
    ),
}


class Pair:
    """The same model in eager and in graph mode, with the same vectors."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        base = case.make().double()
        self.keys = list(base.state_dict())
        self.inputs = [_doubled(case.call(*sizes)) for sizes in case.others]
        targets = {name: value for name, value in case.fields.items() if name.startswith("target")}
        self.second = hra_fx.HRAConfig(r=4, **targets)
        settings = hra_fx.HRAConfig(r=4, **case.fields)
        example = _doubled(case.call(*case.example)) if case.example else None
        self.graph, self.eager = twins(base, example, settings, traced=case.traced)

    def both(self, act: Callable[[Any], Any]) -> None:
        """Do the same to both, in place."""
        act(self.eager)
        act(self.graph)

    def check(self, *, trained: bool = True) -> None:
        """Outputs, gradients and buffers are equal, for other sizes, in both modes.

        Adapters that are not `trained` (merged, disabled or scaled) have no gradients.
        """
        for training in (True, False):
            for inputs in self.inputs:
                with torch.set_grad_enabled(trained):
                    wanted, found = (run(model.train(training), inputs) for model in (self.eager, self.graph))
                assert wanted.keys() == found.keys(), wanted.keys() ^ found.keys()
                for name, value in wanted.items():
                    torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)


def twins(
    base: nn.Module, example: Any, settings: hra_fx.HRAConfig | None = None, *, traced: bool = False
) -> tuple[Any, Any]:
    """The graph and the eager model, with the same vectors."""
    settings = settings or config()
    eager = hra_fx.transform(copy.deepcopy(base), settings)
    randomise(eager)
    if traced:
        graph = hra_fx.transform(graph_of(base), settings)
    else:
        graph = hra_fx.transform(base, settings, trace=True, example_inputs=example)
    graph.load_state_dict(eager.state_dict())
    return graph, eager


def run(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs of a call, the gradients of their squares, and the buffers afterwards."""
    torch.manual_seed(1)
    model.zero_grad()
    leaves = pytree.tree_flatten_with_path(model(**inputs))[0]
    values = {pytree.keystr(path): value for path, value in leaves if isinstance(value, Tensor)}
    loss = torch.stack([value.square().sum() for value in values.values()]).sum()
    if loss.requires_grad:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in values.items()} | gradients | dict(model.named_buffers())


def _doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
