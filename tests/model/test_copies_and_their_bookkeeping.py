"""Trained copies are not lost, nor mixed up, by ties, parts, shared modules, nested blocks and other models' states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hra_fx


class Two(nn.Module):
    """Two layers and a head; `shared` is the head by a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.shared = self.head
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.b(self.a(x))) + self.bias


def config(*targets: str, **fields: Any) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**{"r": 2, "target_modules": list(targets), "init_weights": False, **fields})


def turn(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def two(**fields: Any) -> tuple[Two, Any]:
    torch.manual_seed(0)
    base = Two()
    model = hra_fx.transform(copy.deepcopy(base), config("a", **fields), "a")
    hra_fx.add_adapter(model, "b", config("b", **fields))
    turn(model, 1)
    hra_fx.set_adapter(model, "b")
    turn(model, 2)
    return base, model


def tied() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, attention_bias=True, **sizes)).eval()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
IDS = torch.tensor([[1, 5, 9]])


def test_a_tie_that_is_there_again_is_said_again_though_other_copies_are_folded() -> None:
    model = hra_fx.transform(tied(), config("q_proj", modules_to_save=["lm_head"]), "a")
    hra_fx.add_adapter(model, "b", config("q_proj", bias="hra_only"))
    assert not model.config.tie_word_embeddings
    hra_fx.set_adapter(model, "b")
    turn(model, 3)
    hra_fx.delete_adapter(model, "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    hra_fx.fold(model)
    assert model.config.tie_word_embeddings


def test_a_tie_is_not_said_while_a_copy_waits_that_unties() -> None:
    model = hra_fx.transform(tied(), config("q_proj", bias="hra_only"), "a")
    hra_fx.add_adapter(model, "b", config("v_proj", modules_to_save=["lm_head"]))
    hra_fx.fold(model, "a")
    assert not model.config.tie_word_embeddings
    hra_fx.set_adapter(model, "b")
    turn(model, 3)
    before = model(IDS).logits
    model.tie_weights()
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_after_a_fold_untied_tensors_have_the_flags_of_before(name: str) -> None:
    model = hra_fx.transform(tied(), config("q_proj", modules_to_save=[name]))
    with pytest.warns(hra_fx.HRAWarning, match="embeddings stay untied"):
        hra_fx.fold(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_part_with_trained_copies_is_not_folded_alone() -> None:
    model = nn.ModuleDict({"inner": Two(), "last": nn.Linear(3, 3)})
    hra_fx.transform(model, config("inner.a", modules_to_save=["inner.head"]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(hra_fx.AdapterError, match=r"^head: it has trained copies .* Fold the whole model\.$"):
        hra_fx.fold(model["inner"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_merge_inside_a_disabled_block_is_not_merged_again_after_it() -> None:
    base, _ = two()
    model = hra_fx.HRAModel(copy.deepcopy(base), config("a"))
    wanted, weight = model(X), model.a.weight.clone()
    model.merge_adapter()
    with model.disable_adapter():
        model.enable_adapter_layers()
        model.merge_adapter()
    assert torch.allclose(model(X), wanted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.a.weight, weight)


def test_a_copy_of_an_adapter_that_the_model_does_not_have_is_reported_and_kept_out() -> None:
    base, model = two(modules_to_save=["head"])
    other = hra_fx.transform(copy.deepcopy(base), config("a", modules_to_save=["head"]), "a")
    loaded = other.load_state_dict(model.state_dict(), strict=False)
    assert any("of_another_adapter.weight" in key for key in loaded.unexpected_keys)
    with hra_fx.disable_adapters(other):
        assert torch.equal(other(X), base(X))
    hra_fx.set_adapter(model, "a")
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a parent"])
def test_a_state_taken_while_switched_off_is_loaded_rightly_into_shared_modules_and_the_root(inside: bool) -> None:
    base, model = two(modules_to_save=["head"], bias="all")
    _, other = two(modules_to_save=["head"], bias="all")
    turn(model, 9)
    saver, loader = (nn.ModuleDict({"m": each}) if inside else each for each in (model, other))
    with hra_fx.disable_adapters(model):
        state = {key: value.clone() for key, value in saver.state_dict().items()}
    loader.load_state_dict(state)
    assert torch.equal(other(X), model(X))
    with hra_fx.disable_adapters(other):
        assert torch.equal(other(X), base(X))


def test_a_copy_that_is_not_finite_is_not_folded() -> None:
    _, model = two(modules_to_save=["head"])
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    before = model.b.weight.clone()
    with pytest.raises(hra_fx.FoldError, match=r"^head: its trained copy is not finite"):
        hra_fx.fold(model)
    assert torch.equal(model.b.weight, before) and "b" in model.b.hra_u


@pytest.mark.parametrize("state", ["merged", "unmerged", "of the base model"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_from_the_other_side_of_a_merge_is_refused_and_changes_nothing(state: str, strict: bool) -> None:
    base, model = two()
    _, other = two()
    turn(model, 5)
    hra_fx.merge_adapter(model if state == "merged" else other)
    before, wanted = {key: value.clone() for key, value in other.state_dict().items()}, other(X)
    given = base.state_dict() if state == "of the base model" else model.state_dict()
    side = "state and not in the model" if state == "merged" else "model and not in the state"
    with pytest.raises(RuntimeError, match=f"adapters are merged in the {side}. Merge or unmerge them first"):
        other.load_state_dict(given, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert torch.equal(other(X), wanted)
