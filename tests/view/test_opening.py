"""Which modules are open: within the budget, and every adapted layer in exactly one box."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torchvision
import transformers
from torch import nn

import hra_fx
from hra_fx.view.drawing import drawing_of
from hra_fx.view.opening import BUDGET, Block, opened
from hra_fx.view.tree import Item, Leaf, Scope


def single(block: Block) -> list[Item]:
    """What the single boxes of a block stand for."""
    return [block.item] if block.parts is None else [item for part in block.parts for item in single(part)]


def t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 4, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=11, **sizes))


MODELS = {
    torchvision.models.resnet50: r".*(conv\d|downsample\.0)",
    torchvision.models.mobilenet_v3_small: r".*\.\d+\.0|.*fc\d",
    t5: r".*\.(q|v|wi|wo)",
}


@pytest.mark.parametrize("make", MODELS)
def test_a_large_model_has_open_and_closed_blocks(make: Callable[[], nn.Module]) -> None:
    model = hra_fx.transform(make().eval(), hra_fx.HRAConfig(r=2, target_modules=MODELS[make]))
    block = opened(drawing_of(model).tree(), None)
    boxes = single(block)
    assert len(boxes) <= BUDGET
    assert any(isinstance(item, Scope) and item.marks for item in boxes)
    assert any(isinstance(item, Leaf) and item.marks for item in boxes)
