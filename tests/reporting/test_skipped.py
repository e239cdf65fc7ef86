"""The layers that carry nothing, each with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hra_fx
from hra_fx import HRAConfig, report, transform
from hra_fx.reporting.skipped_layers import SkippedLayer


def llama(layers: int = 2) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    )


def reasons(model: Any) -> dict[str, str]:
    return {layer.path: layer.reason for layer in report(model).skipped}


def test_every_layer_is_either_adapted_or_skipped() -> None:
    model = llama()
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = report(transform(model, HRAConfig(r=2, target_modules=["q_proj", "down_proj"])))
    adapted, skipped = {row.path for row in found}, {layer.path for layer in found.skipped}
    assert adapted | skipped == linear
    assert not adapted & skipped
    assert [layer.site for layer in found.skipped if layer.path == "lm_head"] == ["Linear 16->20"]


def test_not_named() -> None:
    found = reasons(transform(llama(), HRAConfig(r=2, target_modules=["q_proj"])))
    assert set(found.values()) == {"target_modules=['q_proj'] does not name it"}


def test_a_regular_expression_that_does_not_name_it() -> None:
    found = reasons(transform(llama(), HRAConfig(r=2, target_modules=r".*\.0\..*q_proj")))
    assert found["model.layers.1.self_attn.q_proj"] == r"target_modules='.*\\.0\\..*q_proj' does not name it"


def test_the_default_does_not_name_it() -> None:
    found = reasons(transform(llama(), HRAConfig(r=2)))
    text = "the default target_modules of this architecture, ['q_proj', 'v_proj'], do not name it"
    assert found["model.layers.0.self_attn.k_proj"] == text


def test_excluded() -> None:
    config = HRAConfig(r=2, target_modules=["q_proj", "k_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
    found = reasons(transform(llama(), config))
    text = "exclude_modules=['layers.0.self_attn.q_proj'] leaves it out"
    assert found["model.layers.0.self_attn.q_proj"] == text
    assert "model.layers.1.self_attn.q_proj" not in found


@pytest.mark.parametrize(
    ("indices", "shown"), [([0, 2], "[0, 2]"), (1, "1"), (list(range(10)), "[0, ..., 9] (10 of them)")], ids=str
)
def test_outside_of_the_layers_to_transform(indices: Any, shown: str) -> None:
    config = HRAConfig(r=2, target_modules=["q_proj"], layers_to_transform=indices, layers_pattern="layers")
    found = reasons(transform(llama(11), config))
    assert found["model.layers.10.self_attn.q_proj"] == f"its layer index is not among layers_to_transform={shown}"


def test_no_layer_index_in_the_path() -> None:
    config = HRAConfig(r=2, target_modules=["proj"], layers_to_transform=[0, 1], layers_pattern="blocks")
    blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(2))
    model = nn.ModuleDict({"blocks": blocks, "out": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    assert reasons(transform(model, config)) == {
        "out.proj": "no layer index is found in its path, and layers_to_transform=[0, 1] asks for some"
    }


def test_all_linear_leaves_out_the_output_layer_and_what_is_not_linear() -> None:
    assert reasons(transform(llama(), HRAConfig(r=2, target_modules="all-linear"))) == {
        "lm_head": "it is the output layer, which target_modules='all-linear' leaves out"
    }
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    assert reasons(transform(model, HRAConfig(r=2, target_modules="all-linear"))) == {
        "0": "target_modules='all-linear' means linear layers only"
    }


def test_saved_in_full() -> None:
    config = HRAConfig(r=2, target_modules=r".*(q_proj|lm_head)", modules_to_save=["lm_head"])
    found = reasons(transform(llama(), config))
    assert found["lm_head"] == "modules_to_save=['lm_head'] trains it in full"


def test_two_fields_at_once() -> None:
    config = HRAConfig(
        r=2, target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"], layers_to_transform=0
    )
    assert reasons(transform(llama(), config))["model.layers.1.self_attn.q_proj"] == (
        "exclude_modules=['layers.1.self_attn.q_proj'] leaves it out, and its layer index is not among "
        "layers_to_transform=0"
    )


def test_several_adapters_give_a_reason_each() -> None:
    model = transform(llama(), HRAConfig(r=2, target_modules=["q_proj"]), "a")
    hra_fx.add_adapter(model, "b", HRAConfig(r=2, target_modules=["v_proj"], exclude_modules=["k_proj"]))
    found = reasons(model)
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}.isdisjoint(found)
    assert found["model.layers.0.self_attn.o_proj"] == (
        "target_modules=['q_proj'] does not name it (adapter a); target_modules=['v_proj'] does not name it (adapter b)"
    )


def test_columns_of_gpt2_are_layers_too() -> None:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    found = report(transform(GPT2LMHeadModel(config), HRAConfig(r=2, target_modules=["c_attn"])))
    assert {layer.path: layer.site for layer in found.skipped}["transformer.h.0.mlp.c_fc"] == "Conv1D 16->64"


def test_a_layer_that_was_put_in_its_place_since() -> None:
    model: Any = transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), HRAConfig(r=2, target_modules=["0", "1"]))
    model[1] = nn.Linear(4, 2)
    assert report(model).skipped == (
        SkippedLayer("1", "Linear 4->2", "it was folded, or put in its place, after the model was transformed"),
    )


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.model(x))


def test_around_a_transformed_model() -> None:
    inner = transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"]))
    assert reasons(Wrapper(inner)) == {
        "model.1": "target_modules=['0'] does not name it",
        "head": "it is outside of the model that was transformed, 'model'",
    }
    text = "nobody knows: this is a part of the model that was transformed"
    whole = transform(Wrapper(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), HRAConfig(r=2, target_modules=["0"]))
    assert reasons(whole.model) == {"1": text}


def test_a_shared_layer_is_skipped_once() -> None:
    layer = nn.Linear(4, 4)
    model = transform(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["3"]))
    assert [layer.path for layer in report(model).skipped] == ["0"]


def test_nothing_is_skipped_where_all_is_adapted() -> None:
    found = report(transform(nn.Sequential(nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"])))
    assert found.skipped == ()
    assert "Without reflections" not in str(found)


def test_the_table_says_it_once_with_the_count() -> None:
    text = str(report(transform(llama(9), HRAConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))))
    assert "Without reflections: 63 layers" in text
    assert "  model.layers.*.self_attn.q_proj (8): its layer index is not among layers_to_transform=[1]\n" in text
    assert "model.layers.*.self_attn.k_proj (9), model.layers.*.self_attn.v_proj (9), " in text
    assert " and 10 more: target_modules=['q_proj'] does not name it\n" in text


def test_a_report_of_skipped_layers_draws_no_numbers() -> None:
    model = transform(llama(), HRAConfig(r=2, target_modules=["q_proj"]))
    state = torch.get_rng_state()
    report(model)
    assert torch.equal(torch.get_rng_state(), state)
