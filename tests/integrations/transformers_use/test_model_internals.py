"""An adapted model is the model that it was to transformers: its class, attributes and gradient checkpointing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from oracles import relative_error
from tiny_models import BASES, adapted, batch, pairs, turn
from torch import Tensor
from transformers import BertForSequenceClassification, LlamaForCausalLM
from transformers.utils import find_labels

import hra_fx

# The names that transformers has had since 5.0; it means to rename them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning",
)


def gradients(model: Any, kind: str, *, calls: int) -> dict[str, Tensor]:
    """Of all that is trained, and a check of how often a layer in the first block is called."""
    layer = next(part for name, part in model.named_modules() if name.endswith(("query", "q_proj")))
    called: list[Any] = []
    hook = layer.register_forward_hook(lambda *args: called.append(args))
    model.zero_grad()
    torch.manual_seed(3)
    model.train()(**batch(kind)).loss.backward()
    hook.remove()
    assert len(called) == calls
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, gradient in found.items() if gradient is None] == []
    return {name: gradient.clone() for name, gradient in found.items()}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pairs
def test_the_gradients_are_those_without(kind: str, shape: str, use_reentrant: bool, when: str) -> None:
    model = base = BASES[kind]()
    if when == "after":
        model = adapted(kind, shape, base=base)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if when == "before":
        model = adapted(kind, shape, base=base)
    turn(model)
    found = gradients(model, kind, calls=2)
    model.gradient_checkpointing_disable()
    wanted = gradients(model, kind, calls=1)
    assert {name: error for name in wanted if (error := relative_error(found[name], wanted[name])) > 1e-5} == {}


CLASSES = {"bert": BertForSequenceClassification, "llama": LlamaForCausalLM}


@pairs
def test_it_is_its_class_with_its_name_attributes_and_signature(kind: str, shape: str) -> None:
    base = BASES[kind]()
    embeddings, head, settings = base.get_input_embeddings(), base.get_output_embeddings(), base.config
    model = adapted(kind, shape, base=base)
    assert isinstance(model, CLASSES[kind])
    assert isinstance(model, hra_fx.HRAModel) is (shape == "HRAModel")
    assert type(model).__name__ == CLASSES[kind].__name__
    assert str(type(model)) == str(CLASSES[kind])
    assert model is base
    assert model.config is settings
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert adapted(kind, shape, base=BASES[kind]().bfloat16()).dtype == torch.bfloat16
    assert model.get_input_embeddings() is embeddings
    assert model.get_output_embeddings() is head
    assert model.main_input_name == "input_ids"
    assert model.can_generate() is (kind == "llama")
    # The Trainer reads the names of arguments.
    assert inspect.signature(model.forward) == inspect.signature(BASES[kind]().forward)
    assert find_labels(type(model)) == find_labels(CLASSES[kind]) == ["labels"]
