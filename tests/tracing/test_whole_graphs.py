"""`hra_fx.graphs(model, example_inputs)`: one graph of a call, each reflection one node, and nothing else touched."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from whole_graphs import (
    TOKENS,
    Branching,
    Broken,
    adapted,
    bert,
    branching,
    calls_of,
    check_whole,
    gpt2,
    image,
    llama,
    mamba,
    reflections_in,
    t5,
    turned,
)

import hra_fx
from hra_fx.errors import AdapterError


@pytest.mark.parametrize(
    "make", [llama, bert, t5, *(pytest.param(make, marks=pytest.mark.slow) for make in (gpt2, mamba))]
)
def test_a_model_of_transformers_is_one_graph(make: Callable[[], nn.Module]) -> None:
    labels = torch.tensor([0, 1]) if make is bert else TOKENS
    graph = check_whole(make(), {"input_ids": TOKENS, "labels": labels})
    assert [node.target for node in graph.graph.find_nodes(op="placeholder")] == ["input_ids", "labels"]


def test_reflections_of_a_llama_are_grouped_by_what_they_read() -> None:
    graph = hra_fx.graphs(llama(), {"input_ids": TOKENS})[""]
    read: Counter[fx.Node] = Counter()
    for node in graph.graph.nodes:
        if "hra" in node.meta and node.meta["hra"].role == "reflection":
            read[node.args[0]] += 1
    assert sorted(read.values()) == [1, 1, 1, 1, 2, 2, 3, 3]
    layers = [
        node.meta["hra"].path for node in graph.graph.nodes if "hra" in node.meta and node.meta["hra"].role == "layer"
    ]
    assert Counter(layers) == reflections_in(graph)
    assert len(graph.graph.nodes) < 240


@pytest.mark.slow
def test_a_unet_of_diffusers_is_one_graph() -> None:
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": 8, "attention_head_dim": 4}
    model = UNet2DConditionModel(sample_size=4, norm_num_groups=4, mid_block_type=None, **blocks, **sizes).eval()
    inputs = {
        "sample": torch.randn(1, 4, 4, 4),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 3, 8),
    }
    check_whole(adapted(model, r".*(to_q|to_v|conv1|conv_in|conv_out)"), inputs)


@pytest.mark.slow
def test_a_detector_of_torchvision_is_several_graphs() -> None:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone: Any = nn.Sequential(nn.Conv2d(3, 32, 8, stride=8), nn.BatchNorm2d(32), nn.ReLU())
    backbone.out_channels = 32
    model = RetinaNet(backbone, 3, min_size=32, max_size=32, anchor_generator=AnchorGenerator(((16,),), ((1.0,),)))
    model = adapted(model.eval(), ["backbone.0", "head.regression_head.bbox_reg"])
    inputs = ([torch.rand(3, 32, 32)],)
    found = hra_fx.graphs(model, inputs)
    assert list(found) == [f"call[{index}]" for index in range(len(found))]
    assert len(found) > 1
    assert reflections_in(*found.values()) == calls_of(model, inputs)


def test_a_model_that_fx_captured_whole_gives_the_graph_of_fx() -> None:
    model = adapted(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), ["0"])
    assert hra_fx.graphs(model, image())[""].code == hra_fx.graphs(model)[""].code


@pytest.mark.parametrize("fields", [{}, {"r": 3}, {"apply_GS": True}, {"r": 3, "init_weights": False}], ids=str)
def test_every_form_of_a_site_is_one_node(fields: dict[str, Any]) -> None:
    graph = check_whole(branching(**fields), (image(), 2.0))
    found = reflections_in(graph)
    assert found.keys() == {"conv", "attention", "attention.out_proj", "head"} and found["head"] == 2
    notes = [
        node.meta["hra"] for node in graph.graph.nodes if "hra" in node.meta and node.meta["hra"].role != "reflection"
    ]
    assert Counter((note.path, note.role) for note in notes)["head", "layer"] == 2
    assert Counter((note.path, note.role) for note in notes)["conv", "layer"] == 1
    read = {path for note in notes for path in note.also} | {note.path for note in notes if note.role == "reader"}
    assert "attention.out_proj" in read


def test_two_active_adapters_are_one_node() -> None:
    model = branching()
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=3, target_modules=["conv", "head"]))
    hra_fx.set_adapter(model, ["other", "default"])
    assert reflections_in(check_whole(turned(model), image())) == calls_of(model, image())


def quiet_reflections(model: nn.Module) -> Counter[str]:
    """Those of a model whose vectors have no gradient, once its graph gave its outputs."""
    graph = hra_fx.graphs(model, image())[""]
    torch.testing.assert_close(graph(image()), tuple(model(image()).values()), rtol=1e-6, atol=1e-6)
    return reflections_in(graph)


def test_a_scaled_adapter_is_one_node() -> None:
    model = branching()
    hra_fx.set_scale(model, "default", 0.5)
    assert quiet_reflections(model)["head"] == 2


def test_adapters_that_are_switched_off_or_merged_are_no_nodes() -> None:
    model = branching()
    with hra_fx.disable_adapters(model):
        assert not quiet_reflections(model)
    hra_fx.merge_adapter(model)
    assert not quiet_reflections(model)


def test_inputs_keep_their_places_though_one_is_unused_or_given_twice() -> None:
    class Three(Branching):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(a - 2 * c) if a.shape[0] < 100 else a

    model = adapted(Three(), ["head"])
    a, b = torch.randn(2, 5, 4)
    for inputs in ((a, b, a), (a, b, b), (b, a, a + 1)):
        graph = hra_fx.graphs(model, inputs)[""]
        assert [node.target for node in graph.graph.find_nodes(op="placeholder")] == ["args_0", "args_1", "args_2"]
        torch.testing.assert_close(graph(*inputs)[0], model(*inputs))


def test_graphs_are_copied_and_pickled() -> None:
    model = branching()
    graph = hra_fx.graphs(model, image())[""]
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        torch.testing.assert_close(other(image()), graph(image()), rtol=0, atol=0)
    assert reflections_in(copy.deepcopy(graph)) == reflections_in(graph)


def state_of(model: nn.Module) -> Any:
    tensors = {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    modes = [(type(module), module.training, len(module._forward_hooks)) for module in model.modules()]
    chance = torch.get_rng_state().tolist(), random.getstate()
    return tensors, flags, modes, chance, torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [Branching, Broken])
def test_model_and_random_numbers_are_as_before(kind: type[nn.Module]) -> None:
    model = adapted(kind().train(), ["conv", "head"])
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = image()
    before, version = state_of(model), x._version
    found = hra_fx.graphs(model, x)
    assert state_of(model) == before and x._version == version
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert len(found) == (2 if kind is Broken else 1) and all(graph.training for graph in found.values())


def test_pieces_run_one_after_the_other_give_what_the_model_gives() -> None:
    model = adapted(Broken().eval(), ["conv", "head"])
    first, second = hra_fx.graphs(model, image()).values()
    torch.testing.assert_close(second(*first(image())), (model(image()),), rtol=1e-6, atol=1e-6)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in (*first.named_parameters(), *first.named_buffers(), *second.named_parameters()):
        assert tensor is own[name]
    assert reflections_in(first) == {"conv": 1} and reflections_in(second) == {"head": 1}


# TorchDynamo asks for `.grad` of what it hands over a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("kind", [Branching, Broken])
def test_what_the_user_compiled_is_kept_and_compiles_as_ever(kind: type[nn.Module]) -> None:
    model = adapted(kind().eval(), ["conv", "head"])
    compiled: list[fx.GraphModule] = []
    theirs = torch.compile(model, backend=keeping(compiled))
    expected = theirs(image())
    count = len(compiled)
    hra_fx.graphs(model, image())
    hra_fx.graphs(model, image())
    torch.testing.assert_close(theirs(image()), expected, rtol=0, atol=0)
    assert len(compiled) == count
    after: list[fx.GraphModule] = []
    torch.compile(model, backend=keeping(after))(image())
    targets = [[node.target for node in graph.graph.nodes if node.op != "placeholder"] for graph in (*compiled, *after)]
    assert targets[:count] == targets[count:]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_recordings_do_not_count_against_the_limit_of_recompiles_of_the_user() -> None:
    torch._dynamo.reset()  # for other tests count too
    model = adapted(Broken().eval(), ["conv", "head"])
    compiled: list[fx.GraphModule] = []
    theirs = torch.compile(model, backend=keeping(compiled), dynamic=False)
    theirs(image())
    for _ in range(4):
        hra_fx.graphs(model, image())
    count = len(compiled)
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        theirs(image()[:1])
    assert len(compiled) == 2 * count == 4


def keeping(graphs: list[fx.GraphModule]) -> Any:
    """A backend that runs what it is given."""

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.slow
def test_models_are_compiled_and_exported_as_ever_afterwards() -> None:
    model = branching()
    hra_fx.graphs(model, image())
    expected = model(image())
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(image())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.export.export(model, (image(),)).module()(image()), expected, rtol=1e-5, atol=1e-6)


def test_a_setting_of_the_user_that_switches_compiling_off_is_no_obstacle() -> None:
    model = branching()
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(suppress_errors=True, disable=True):
        assert list(hra_fx.graphs(model, image())) == [""]


@pytest.mark.parametrize("inputs", [3, "x", {1.0}], ids=str)
def test_example_inputs_of_another_kind_are_refused(inputs: Any) -> None:
    with pytest.raises(
        AdapterError, match=f"^example_inputs must be a tensor, a tuple .*, got {type(inputs).__name__}"
    ):
        hra_fx.graphs(branching(), inputs)


def test_inputs_on_which_the_model_does_not_run_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"Branching: it does not run on example_inputs \(.*\)\. Give the inputs of"):
        hra_fx.graphs(branching(), torch.randn(2, 5, 3, 3))


def test_a_call_without_operators_is_refused() -> None:
    class Idle(Branching):
        def forward(self, x: Any) -> Any:
            return x if x < 4 else self.head(x)

    with pytest.raises(AdapterError, match="Idle: TorchDynamo found no operator on tensors in this call"):
        hra_fx.graphs(adapted(Idle(), ["head"]), (3,))


def test_a_model_that_cannot_be_copied_is_refused_where_its_call_has_graph_breaks() -> None:
    model = adapted(Broken(), ["head"])
    model.lines = (line for line in "ab")
    with pytest.raises(
        AdapterError, match=r"Broken: its call has graph breaks, and it cannot be copied .*graphs\(model\)"
    ):
        hra_fx.graphs(model, image())


def test_torch_dynamo_is_not_imported_before_it_is_asked_for() -> None:
    code = "import sys, hra_fx; hra_fx.graphs; hra_fx.transform; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
