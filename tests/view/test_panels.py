"""What is drawn: within the budget, and every site in exactly one box of the overview."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torchvision
import transformers
from torch import Tensor, nn

import hra_fx
from hra_fx.view.graph import leaves_of
from hra_fx.view.panels import BUDGET, Panel, plan
from hra_fx.view.scopes import scope_tree
from hra_fx.view.subject import subject_of


class Wide(nn.Module):
    """Forty branches of different widths, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.ModuleList(nn.Linear(4, 4 + i) for i in range(40))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x).sum() for layer in self.branch)  # type: ignore[return-value]


def bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2, vocab_size=11
        )
    )


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=4, num_heads=2, vocab_size=11)
    )


def opt() -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=8, ffn_dim=16, num_hidden_layers=5, num_attention_heads=2, vocab_size=11, word_embed_proj_dim=8
        )
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], str | list[str]]] = {
    "resnet18": (torchvision.models.resnet18, r".*(conv\d|downsample\.0|fc)"),
    "resnet50": (torchvision.models.resnet50, r".*(conv\d|downsample\.0)"),
    "mobilenet": (torchvision.models.mobilenet_v3_small, r".*\.\d+\.0|.*fc\d"),
    "bert": (bert, ["query", "key", "value", "dense"]),
    "t5": (t5, ["q", "k", "v", "o", "wi", "wo"]),
    "opt": (opt, "all-linear"),
    "flat": (
        lambda: nn.Sequential(*(m for i in range(75) for m in (nn.Linear(4 + i % 3, 4 + (i + 1) % 3), nn.ReLU()))),
        r"\d*[02468]",
    ),
    "wide": (Wide, r"branch\.\d+"),
    "one layer": (lambda: nn.Sequential(nn.Linear(4, 4)), ["0"]),
}


@cache
def adapted(name: str) -> nn.Module:
    make, targets = MODELS[name]
    model = make().eval()
    return hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=targets))


@cache
def planned(model: nn.Module, budget: int = BUDGET) -> list[Panel]:
    return plan(scope_tree(leaves_of(subject_of(model, hra_fx.graphs(model))), "model"), budget)


@pytest.mark.parametrize("name", MODELS)
def test_panels_have_every_layer_once_within_the_budget(name: str) -> None:
    model = adapted(name)
    paths = sorted(row.path for row in hra_fx.report(model))
    for budget in (10, 20, 40, BUDGET) if name in ("resnet18", "flat", "wide", "bert") else (BUDGET,):
        overview, *others = panels = planned(model, budget)
        assert sorted(mark.path for box in overview.block.boxes() for mark in box.item.marks) == paths
        assert sum(len(list(panel.block.boxes())) for panel in panels) <= budget
        letters = [panel.letter for panel in others]
        assert overview.letter == ""
        assert len(set(letters)) == len(letters)
        assert {box.letter for panel in panels for box in panel.block.boxes()} - {""} == set(letters)
        assert all(panel.used for panel in others)


def test_a_panel_shows_as_many_sites_as_each_box_that_refers_to_it_counts() -> None:
    overview, *others = planned(adapted("resnet50"))
    inside = {panel.letter: len(panel.block.item.marks) // panel.block.item.count for panel in others}
    referring = [box for box in overview.block.boxes() if box.letter]
    assert len(referring) == 8
    assert all(len(box.item.marks) == inside[box.letter] * box.item.count for box in referring)
