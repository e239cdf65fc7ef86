"""The report of exported programs: the numbers of the model that was captured."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from export.programs import QUIET
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hra_fx import HRAConfig, fold, report, transform
from hra_fx.errors import AdapterError
from hra_fx.reporting.result import Report


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
