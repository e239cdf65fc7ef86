"""The layers without an adapter, each with its reason, of models and of programs; and the rows of programs."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from export.programs import QUIET
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import hra_fx
from hra_fx import HRAConfig, fold, report, transform
from hra_fx.errors import AdapterError
from hra_fx.reporting.result import Report


def llama(layers: int = 2) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **heads, **sizes))


def blocks() -> Any:
    """Two layers with a block index, and one without."""
    inner = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(2))
    return nn.ModuleDict({"blocks": inner, "out": nn.ModuleDict({"proj": nn.Linear(4, 4)})})


def convolution() -> Any:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))


def reasons(model: Any) -> dict[str, str]:
    return {layer.path: layer.reason for layer in report(model).skipped}


Q0, Q1 = "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"
CASES: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "not in the list": (llama, {"target_modules": ["q_proj"]}, "lm_head", "not in target_modules=['q_proj']"),
    "regular expression": (
        llama,
        {"target_modules": r".*\.0\..*q_proj"},
        f"model.{Q1}",
        r"not matched by target_modules='.*\\.0\\..*q_proj'",
    ),
    "defaults": (
        llama,
        {},
        "model.layers.0.self_attn.k_proj",
        "not in the default target_modules of this architecture, ['q_proj', 'v_proj']",
    ),
    "excluded": (
        llama,
        {"target_modules": ["q_proj"], "exclude_modules": [Q0]},
        f"model.{Q0}",
        f"excluded by exclude_modules=['{Q0}']",
    ),
    "all-linear, head": (
        llama,
        {"target_modules": "all-linear"},
        "lm_head",
        "the output layer, which target_modules='all-linear' does not include",
    ),
    "all-linear, convolution": (
        convolution,
        {"target_modules": "all-linear"},
        "0",
        "not a linear layer, which target_modules='all-linear' does not include",
    ),
    "no index": (
        blocks,
        {"target_modules": ["proj"], "layers_to_transform": [0, 1], "layers_pattern": "blocks"},
        "out.proj",
        "no layer index in its path, and layers_to_transform=[0, 1] is set",
    ),
    "two reasons": (
        llama,
        {"target_modules": ["q_proj"], "exclude_modules": [Q1], "layers_to_transform": 0},
        f"model.{Q1}",
        f"excluded by exclude_modules=['{Q1}'], and layer index not in layers_to_transform=0",
    ),
    **{
        f"index not in {shown}": (
            partial(llama, 11),
            {"target_modules": ["q_proj"], "layers_to_transform": indices, "layers_pattern": "layers"},
            "model.layers.10.self_attn.q_proj",
            f"layer index not in layers_to_transform={shown}",
        )
        for indices, shown in (([0, 2], "[0, 2]"), (1, "1"), (list(range(10)), "[0, ..., 9] (10 of them)"))
    },
}


@pytest.mark.parametrize("case", CASES)
def test_reasons(case: str) -> None:
    make, fields, path, reason = CASES[case]
    assert reasons(transform(make(), HRAConfig(r=2, **fields)))[path] == reason


def test_every_layer_is_either_adapted_or_skipped() -> None:
    model = llama()
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = report(transform(model, HRAConfig(r=2, target_modules=["q_proj", "down_proj"])))
    adapted, skipped = {row.path for row in found}, {layer.path for layer in found.skipped}
    assert adapted | skipped == linear
    assert not adapted & skipped
    assert [layer.layer_type for layer in found.skipped if layer.path == "lm_head"] == ["Linear 16->20"]
    full = report(transform(nn.Sequential(nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"])))
    assert full.skipped == ()
    assert "Not adapted" not in str(full)


@pytest.mark.parametrize("targets", [["q_proj"], r".*(q_proj|lm_head)"])
def test_layers_in_modules_to_save_are_trained_and_not_skipped(targets: Any) -> None:
    found = report(transform(llama(), HRAConfig(r=2, target_modules=targets, modules_to_save=["lm_head"])))
    assert found.trained_in_full == ("lm_head",)
    assert "lm_head" not in {layer.path for layer in found.skipped}
    assert "Trained in full:\n  lm_head\n" in str(found)


def test_several_adapters_give_a_reason_each() -> None:
    model = transform(llama(), HRAConfig(r=2, target_modules=["q_proj"]), "a")
    hra_fx.add_adapter(model, "b", HRAConfig(r=2, target_modules=["v_proj"], exclude_modules=["k_proj"]))
    found = reasons(model)
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}.isdisjoint(found)
    assert found["model.layers.0.self_attn.o_proj"] == (
        "not in target_modules=['q_proj'] (adapter a); not in target_modules=['v_proj'] (adapter b)"
    )


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.model(x))


def test_layers_around_a_transformed_module_and_parts_of_one() -> None:
    inner = transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"]))
    assert reasons(Wrapper(inner).requires_grad_(False)) == {
        "model.1": "not in target_modules=['0']",
        "head": "outside of the transformed module 'model'",
    }
    whole = transform(Wrapper(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), HRAConfig(r=2, target_modules=["0"]))
    assert reasons(whole.model) == {"1": "unknown: this module is a part of a transformed model"}


def test_a_printed_report_groups_layers_by_reason() -> None:
    model = transform(llama(9), HRAConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    state = torch.get_rng_state()
    text = str(report(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert "Not adapted: 63 layers" in text
    assert "  model.layers.*.self_attn.q_proj (8): layer index not in layers_to_transform=[1]\n" in text
    assert "model.layers.*.self_attn.k_proj (9), model.layers.*.self_attn.v_proj (9), " in text
    assert " and 10 more: not in target_modules=['q_proj']\n" in text


def mixtral() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def test_experts_are_named_with_their_share_of_the_model() -> None:
    model = mixtral()
    total = sum(parameter.numel() for parameter in model.parameters())
    found = report(transform(model, HRAConfig(r=2, target_modules="all-linear")))
    assert [(p.path, p.owner_type, p.shape) for p in found.skipped_parameters] == [
        (f"model.layers.{i}.mlp.experts.{name}", "MixtralExperts", shape)
        for i in range(2)
        for name, shape in (("gate_up_proj", (4, 48, 16)), ("down_proj", (4, 16, 24)))
    ]
    experts = 2 * 4 * (48 * 16 + 16 * 24)
    assert sum(parameter.share for parameter in found.skipped_parameters) == pytest.approx(experts / total)
    text = (
        f"Not adapted: 3-D parameters, {100 * experts / total:.1f}% of the base model\n"
        "  model.layers.*.mlp.experts.gate_up_proj (2), model.layers.*.mlp.experts.down_proj (2): to adapt them, use "
        "target_parameters=['experts.gate_up_proj', 'experts.down_proj']\n"
    )
    assert text in str(found)
    assert report(transform(llama(), HRAConfig(r=2))).skipped_parameters == ()


def test_experts_that_are_trained_in_full_are_not_listed() -> None:
    saved = report(transform(mixtral(), HRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"])))
    assert saved.skipped_parameters == ()


def test_a_new_head_is_trained_and_not_missed() -> None:
    model: Any = transform(
        nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)}), HRAConfig(r=2, target_modules=["body"])
    )
    assert [layer.path for layer in report(model).skipped] == ["head"]
    model["head"] = nn.Linear(4, 3)
    assert (report(model).trained_in_full, report(model).skipped) == (("head",), ())
    wrapped = Wrapper(transform(nn.Sequential(nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"])))
    assert report(wrapped).trained_in_full == ("head",)


def test_a_layer_that_lost_its_adapter_comes_first_under_its_own_heading() -> None:
    model: Any = transform(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2)), HRAConfig(r=2, target_modules=["0", "1"])
    )
    model[1] = nn.Linear(4, 2)
    text = str(report(model))
    lost = "Targeted, but not adapted: 1 layer\n  1: folded or replaced after transform\n"
    assert lost in text
    assert text.index(lost) < text.index("Not adapted: 1 layer\n  2: not in target_modules=['0', '1']\n")


# ---- programs ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 1), groups=2)
        self.point = nn.Conv2d(6, 6, 1)
        self.gpt = Conv1D(9, 18)
        self.head = nn.Linear(9, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.relu(self.conv(x))).flatten(1)
        return self.last(self.head(self.gpt(x)))  # type: ignore[no-any-return]


INPUT = (torch.ones(2, 4, 5, 1),)


def moved(tensors: Any) -> None:
    with torch.no_grad():
        for name, tensor in sorted(tensors):
            if ".hra_u." in name and isinstance(tensor, nn.Parameter):
                generator = torch.Generator().manual_seed(len(name))
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


def both(config: HRAConfig) -> tuple[Report, Report]:
    """The reports of the model and of the program, with the same vectors."""
    torch.manual_seed(0)
    model = Net()
    program = torch.export.export(model, INPUT)
    torch.manual_seed(1)
    adapted = transform(program, config)
    torch.manual_seed(1)
    model = transform(model, config)
    for tensors in (model.named_parameters(), adapted.state_dict.items()):
        moved(tensors)
    return report(model), report(adapted)


ALL = ["conv", "point", "gpt", "head"]


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [2, 3])
def test_they_are_those_of_the_model(r: int, apply_GS: bool) -> None:
    model, found = both(HRAConfig(r=r, apply_GS=apply_GS, target_modules=ALL))
    assert [row.path for row in found] == [row.path for row in model] == ALL
    for row, wanted in zip(found, model, strict=True):
        assert (row.layer_type, row.adapter, row.d, row.r) == (wanted.layer_type, wanted.adapter, wanted.d, wanted.r)
        assert row.angles == pytest.approx(wanted.angles, abs=1e-6)
        assert row.share == pytest.approx(wanted.share, rel=1e-5)
        assert row.rotation == pytest.approx(wanted.rotation, rel=1e-5)
        assert row.orthogonality < 1e-5
    assert {layer.path: layer.layer_type for layer in found.skipped} == {"last": "Linear 5->3"}


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"target_modules": ["head"]}, {"not in target_modules=['head']"}),
        (
            {"target_modules": ["head", "last"], "exclude_modules": ["last"]},
            {"not in target_modules=['head', 'last']", "excluded by exclude_modules=['last']"},
        ),
        ({"target_modules": "all-linear"}, {"not a linear layer, which target_modules='all-linear' does not include"}),
    ],
    ids=["not named", "excluded", "all linear"],
)
def test_skipped_layers_have_the_reasons_of_the_model(fields: dict[str, Any], reasons: set[str]) -> None:
    model, program = both(HRAConfig(r=2, **fields))
    assert {layer.reason for layer in model.skipped} == reasons
    assert set(program.skipped) == set(model.skipped)


def test_the_output_layer_of_transformers_and_a_tied_one() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes, use_cache=False))
    program = torch.export.export(model.eval(), (), {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    found = report(transform(program, HRAConfig(r=2, target_modules="all-linear")))
    assert len(found) == 7
    assert {layer.path: layer.reason for layer in found.skipped} == {
        "lm_head": "the output layer, which target_modules='all-linear' does not include"
    }


def test_a_weight_that_the_graph_reads_otherwise_says_so() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + self.second.weight.sum()  # type: ignore[no-any-return]

    program = torch.export.export(Reading(), (torch.ones(1, 4),))
    (skipped,) = report(transform(program, HRAConfig(r=2, target_modules=["first"]))).skipped
    assert skipped.path == "second"
    assert skipped.reason.startswith("its weight is also used by aten.sum.default")


@QUIET
def test_after_decomposition_saving_and_loading() -> None:
    config = HRAConfig(r=3, target_modules=ALL, init_weights=False)
    program = transform(torch.export.export(Net(), INPUT), config, "style")
    wanted = report(program)
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    found = report(torch.export.load(file))
    for row, before in zip(found, wanted, strict=True):
        assert (row.adapter, row.layer_type) == ("style", before.layer_type)
        assert (row.angles, row.share) == (pytest.approx(before.angles), pytest.approx(before.share))
    assert found.skipped == wanted.skipped


def test_what_was_trained_through_the_module_is_seen() -> None:
    program = transform(torch.export.export(Net(), INPUT), HRAConfig(r=2, target_modules=["head"]))
    assert report(program).rows[0].angles == ()
    moved(program.module().named_parameters())
    assert report(program).rows[0].angles != ()


def test_without_reflections_it_is_refused() -> None:
    program = torch.export.export(Net(), INPUT)
    adapted = transform(program, HRAConfig(r=2, target_modules=["head"]))
    for plain in (program, fold(adapted)):
        with pytest.raises(AdapterError, match=r"^the graph has no reflections\. Transform it first"):
            report(plain)
