"""Models that accelerate dispatches over devices, and its hooks: what works as without them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from adapting import config
from integrations.distributed.offloading import CPU, MLP, on_devices
from integrations.distributed.trained import F64, adapted, close, output
from refusals import refused
from second_device import LAZY
from torch import fx, nn

import hra_fx


def test_a_map_that_accelerate_infers_for_an_adapted_model() -> None:
    """It splits a layer with children unless it is told not to; then the vectors are not with the weight."""
    model = MLP.model()
    options: dict[str, Any] = {"max_memory": {0: 4400, "cpu": 10**6}}  # bytes; all but the vectors of layer 2
    assert any(place.endswith(".hra_u") for place in accelerate.infer_auto_device_map(model, **options))
    places = accelerate.infer_auto_device_map(model, **options, no_split_module_classes=["Linear"])
    assert not any(place.endswith(".hra_u") for place in places)
    devices = {name: LAZY if place == 0 else CPU for name, place in places.items()}
    accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    assert close(output(model, MLP), output(MLP.model(), MLP))


@pytest.mark.parametrize(
    "way", ["hooks, transform, fold", "transform, hooks, fold", "transform, hooks, off, fold, hooks"]
)
def test_hooks_come_and_go(way: str) -> None:
    plain = MLP.model()
    wanted, model = output(plain, MLP), MLP.base()
    acts: dict[str, Callable[[nn.Module], object]] = {
        "hooks": lambda model: on_devices(model),
        "transform": lambda model: adapted(model, MLP),
        "off": remove_hook_from_submodules,
        "fold": hra_fx.fold,
    }
    for act in [*way.split(", "), "off", "transform", "hooks"]:
        before = output(model, MLP)
        acts[act](model)
        assert close(output(model, MLP), before) is (act != "transform")
    twice = adapted(hra_fx.fold(plain), MLP)
    assert close(output(model, MLP), output(twice, MLP))
    hra_fx.delete_adapter(model, "default")
    assert close(output(model, MLP), wanted)
    assert [type(part) for part in model] == [type(part) for part in MLP.base()]


# ---- what is refused ----


def test_graphs_of_models_with_hooks_are_refused() -> None:
    graph, model = fx.symbolic_trace(MLP.base()), on_devices(MLP.base())
    add_hook_to_module(graph, ModelHook())
    for made, trace, kind, message in (
        (graph, False, hra_fx.UnsupportedLayerError, "it is a GraphModule, and accelerate added its hook to"),
        (model, True, hra_fx.AdapterError, "trace=True: the model has a hook of accelerate, which a graph"),
    ):
        before = output(made, MLP)
        with pytest.raises(kind, match=message):
            hra_fx.transform(made, config("0"), trace=trace)
        assert torch.equal(output(made, MLP), before)
        remove_hook_from_submodules(made)
        hra_fx.transform(made, config("0"))


def test_a_forward_of_the_users_below_a_hook_is_refused() -> None:
    model = MLP.base()
    model[0].forward = lambda x: x @ torch.zeros(8, 16, dtype=F64)
    on_devices(model)
    assert "its `forward` is set on the instance" in refused(model, config("0"))
