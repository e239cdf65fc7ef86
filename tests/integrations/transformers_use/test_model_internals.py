"""What transformers and torch ask of a model besides its forward: an adapted one answers as the model that it is."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from oracles import relative_error
from tiny_models import BASES, adapted, batch, pairs, turn, vectors_of
from torch import Tensor, nn
from transformers import BertForSequenceClassification, LlamaForCausalLM
from transformers.utils import find_labels

import hra_fx

CLASSES = {"bert": BertForSequenceClassification, "llama": LlamaForCausalLM}


def turned(kind: str, shape: str, **fields: object) -> Any:
    model = adapted(kind, shape, **fields)
    turn(model)
    return model.eval()


def logits(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=batch(kind)["input_ids"]).logits
    return out


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


@pairs
def test_the_parameters_are_counted(kind: str, shape: str) -> None:
    base = BASES[kind]()
    model = adapted(kind, shape)
    vectors = sum(each.numel() for each in vectors_of(model).values())
    head = 2 * 32 + 2 if kind == "bert" else 0
    assert model.num_parameters() == base.num_parameters() + vectors + head
    assert model.num_parameters(only_trainable=True) == vectors + head


@pairs
def test_modes_and_dtypes_reach_every_part_and_tying_again_changes_nothing(kind: str, shape: str) -> None:
    model = turned(kind, shape)
    wanted = logits(model, kind)
    model.tie_weights()
    assert torch.equal(logits(model, kind), wanted)
    assert model.train() is model
    assert all(part.training for part in model.modules())
    assert model.eval() is model
    assert not any(part.training for part in model.modules())
    assert model.to(torch.float64) is model
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    assert relative_error(logits(model, kind), wanted.double()) < 1e-5
