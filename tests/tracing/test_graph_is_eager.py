"""A graph does what eager mode does: models of each kind, and everything that users do with them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from graph_modules import COPIES
from torch import fx, nn
from tracing.captured import CASES, Case, Pair, rows
from tracing.models import TRACED

import hra_fx


@pytest.fixture(scope="module")
def pair_of() -> Callable[[str], Pair]:
    """A copy of the pair of a case; each pair is made once, because a capture takes seconds."""
    made = cache(lambda name: Pair(CASES[name]))
    return lambda name: copy.deepcopy(made(name))


def called(pair: Pair, folder: Path) -> None:
    assert isinstance(pair.graph, fx.GraphModule)
    assert str(hra_fx.report(pair.graph)) == str(hra_fx.report(pair.eager))
    torch.testing.assert_close(hra_fx.orthogonality_loss(pair.graph), hra_fx.orthogonality_loss(pair.eager))


def trained(pair: Pair, folder: Path) -> None:
    for model in (pair.eager, pair.graph):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for inputs in pair.inputs:
            values = [
                x for x in torch.utils._pytree.tree_leaves(model.train()(**inputs)) if isinstance(x, torch.Tensor)
            ]
            torch.stack([value.square().mean() for value in values]).sum().backward()
            optimizer.step()


def saved_and_loaded(pair: Pair, folder: Path) -> None:
    for kind, model in (("eager", pair.eager), ("graph", pair.graph)):
        hra_fx.save_adapter(model, folder / kind)
    eager, graph = folder / "eager", folder / "graph"
    assert (eager / "adapter_model.safetensors").read_bytes() == (graph / "adapter_model.safetensors").read_bytes()
    # A graph that was traced before is a GraphModule to the configuration.
    settings = (json.loads((each / "adapter_config.json").read_text()) for each in (eager, graph))
    one, other = (values | {"auto_mapping": None} for values in settings)
    assert one == other
    randomise(pair.graph, seed=3)
    pair.both(lambda model: hra_fx.load_adapter(model, folder / "eager", "second"))
    pair.both(lambda model: hra_fx.set_adapter(model, "second"))
    pair.check()
    pair.both(lambda model: hra_fx.delete_adapter(model, "default"))


def switched(pair: Pair, folder: Path) -> None:
    pair.both(lambda model: hra_fx.add_adapter(model, "second", pair.second))
    randomise(pair.eager)
    pair.graph.load_state_dict(pair.eager.state_dict())
    pair.both(lambda model: hra_fx.set_adapter(model, ["second", "default"]))
    pair.check()
    pair.both(lambda model: hra_fx.set_scale(model, "second", 0.5))
    with hra_fx.disable_adapters(pair.eager), hra_fx.disable_adapters(pair.graph):
        pair.check(trained=False)
    pair.check(trained=False)
    pair.both(lambda model: hra_fx.set_scale(model, "second", 1.0))
    pair.both(lambda model: hra_fx.set_adapter(model, "second"))


def merged(pair: Pair, folder: Path) -> None:
    pair.both(hra_fx.merge_adapter)
    pair.check(trained=False)
    pair.both(hra_fx.unmerge_adapter)


def folded(pair: Pair, folder: Path) -> None:
    pair.both(hra_fx.fold)
    assert list(pair.graph.state_dict()) == pair.keys


def copied(pair: Pair, folder: Path) -> None:
    for copied in COPIES:
        pair.graph = copied(pair.graph)


ACTIONS = [called, trained, saved_and_loaded, switched, merged, folded, copied]


@pytest.mark.parametrize("act", ACTIONS, ids=lambda act: act.__name__)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.needs("transformers>=5.6") if name == "experts" else ()) for name in CASES],
)
def test_a_graph_does_what_eager_mode_does(
    name: str, act: Callable[[Pair, Path], Any], pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of(name)
    act(pair, tmp_path)
    pair.check()


@pytest.mark.parametrize("make", TRACED)
def test_a_graph_of_torch_fx_and_its_copies_do_what_eager_mode_does(make: type[nn.Module]) -> None:
    pair = Pair(
        Case(make, {"target_modules": "first|second|inner|attention"}, rows, example=None, others=((4, 5), (7, 5)))
    )
    pair.check()
    for copied in COPIES[:2]:
        pair.graph = copied(pair.graph)
        pair.check()


class Valued(nn.Module):
    """Reads the value of a parameter, which a graph would keep as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * float(self.first._parameters["bias"][0].detach()))


def test_a_graph_that_keeps_the_value_of_a_parameter_is_refused() -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["first"])
    with pytest.raises(hra_fx.AdapterError, match="cannot capture Valued"):
        hra_fx.transform(Valued(), config, trace=True, example_inputs=rows(3, 0))


def test_a_graph_has_the_nodes_of_the_adapters_that_are_left() -> None:
    def graph(*targets: str) -> fx.GraphModule:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
        made = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=[*targets]), trace=True)
        assert isinstance(made, fx.GraphModule)
        return made

    def nodes(made: fx.GraphModule) -> list[tuple[str, str]]:
        return [(node.op, str(node.target)) for node in made.graph.nodes]

    model = graph("0", "2")
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=2, target_modules=["2"]))
    assert nodes(model) == nodes(graph("0", "2"))
    with pytest.warns(hra_fx.HRAWarning, match="'other' is active now"):
        hra_fx.delete_adapter(model, "default")
    assert nodes(model) == nodes(graph("2"))
    hra_fx.delete_adapter(model, "other")
    assert nodes(model) == nodes(fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))))
