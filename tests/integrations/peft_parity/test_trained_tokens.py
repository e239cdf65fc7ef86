"""`trainable_token_indices`: rows of embeddings are trained, saved, switched and folded, as by PEFT."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapting import config, randomise
from peft_sides import peft_warnings_ignored
from refusals import refused
from safetensors.torch import load_file
from tiny_models import llama
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError, HRAError
from hra_fx.layers.trained_tokens import ROWS
from hra_fx.lora.save import convert_files

IDS = torch.tensor([[3, 40, 41, 7, 40], [41, 5, 6, 9, 40]])
NEW = [41, 40]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def gemma() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(vocab_size=64, **sizes, **heads))


MODELS = {
    "tied": lambda: llama(tie_word_embeddings=True),
    "untied": llama,
    "scaled": gemma,
}
CASES = [("tied", NEW), ("untied", NEW), ("scaled", NEW), ("untied", {"lm_head": [40], "model.embed_tokens": NEW})]
# PEFT 0.18 does not load this.
BOTH = pytest.param("tied", {"lm_head": NEW, "embed_tokens": NEW}, marks=pytest.mark.needs("peft>=0.21"))
cases = pytest.mark.parametrize(("model", "tokens"), [*CASES, BOTH])


def ours(model: str, tokens: Any, name: str = "default", seed: int = 1, **fields: Any) -> Any:
    """A model with random vectors and rows."""
    made = hra_fx.transform(
        MODELS[model]().eval(), config("q_proj", r=2, trainable_token_indices=tokens, **fields), name
    )
    randomise_all(made, name, seed)
    return made


def randomise_all(model: nn.Module, name: str, seed: int) -> None:
    randomise(model, name, seed=seed)
    hra_fx.set_adapter(model, name)
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if key.endswith(f"hra_tokens.{ROWS}"):
            nn.init.normal_(parameter)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@cases
def test_training_and_files_are_those_of_peft(model: str, tokens: Any, tmp_path: Path) -> None:
    """PEFT's HRAConfig has no such field, but PEFT's code for LoRA's field reads it from any configuration."""
    mine = ours(model, tokens)
    hra_fx.save_adapter(mine, tmp_path)
    with pytest.warns(
        UserWarning, match="Unexpected keyword arguments .'trainable_token_indices'. for class HRAConfig"
    ):
        settings = peft.PeftConfig.from_pretrained(str(tmp_path))
    settings.trainable_token_indices = tokens
    with peft_warnings_ignored():
        theirs = peft.PeftModel.from_pretrained(MODELS[model](), tmp_path, config=settings, is_trainable=True).eval()
    torch.testing.assert_close(logits(mine), logits(theirs), **CLOSE)
    for one in (mine, theirs):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            one(IDS, labels=IDS).loss.backward()
            optimizer.step()
    hra_fx.save_adapter(mine, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    left, right = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert any(key.endswith(f".token_adapter.{ROWS}") for key in left)
    assert mine.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)


@cases
def test_loaded_converted_and_folded(model: str, tokens: Any, tmp_path: Path) -> None:
    mine = ours(model, tokens)
    wanted, base = logits(mine), MODELS[model]().eval()
    hra_fx.save_adapter(mine, tmp_path / "hra")
    torch.testing.assert_close(logits(hra_fx.load_adapter(MODELS[model](), tmp_path / "hra")), wanted)
    hra_fx.save_as_lora(mine, tmp_path / "lora")
    with peft_warnings_ignored():
        lora = peft.PeftModel.from_pretrained(MODELS[model](), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), wanted, **CLOSE)
    with hra_fx.disable_adapters(mine):
        torch.testing.assert_close(logits(mine), logits(base), rtol=0, atol=0)
    hra_fx.merge_adapter(mine)
    torch.testing.assert_close(logits(mine), wanted, **CLOSE)
    hra_fx.unmerge_adapter(mine)
    folded = hra_fx.fold(copy.deepcopy(mine))
    torch.testing.assert_close(logits(folded), wanted, **CLOSE)
    for one in (folded, mine):
        assert (one.lm_head.weight is one.model.embed_tokens.weight) is (
            base.lm_head.weight is base.model.embed_tokens.weight
        )
    hra_fx.delete_adapter(mine, "default")
    for one in (folded, mine):
        assert [*one.state_dict()] == [*base.state_dict()]
        assert [type(part) for part in one.modules()] == [type(part) for part in base.modules()]
        assert [vars(part).keys() for part in one.modules()] == [vars(part).keys() for part in base.modules()]
    torch.testing.assert_close(logits(mine), logits(base), rtol=0, atol=0)


def test_each_adapter_has_its_own_tokens(tmp_path: Path) -> None:
    model, alone = ours("tied", NEW, "a"), logits(ours("tied", NEW, "a"))
    hra_fx.add_adapter(model, "b", config("q_proj", r=2, trainable_token_indices=[7, 5, 3]))
    hra_fx.add_adapter(model, "c", config("q_proj", r=2))
    randomise_all(model, "b", 2)
    other = logits(model)
    torch.testing.assert_close(other, logits(ours("tied", [7, 5, 3], "b", 2)))
    hra_fx.set_adapter(model, ["a", "c"])
    torch.testing.assert_close(logits(model), alone, **CLOSE)
    with pytest.raises(AdapterError, match=r"each have a trained copy of model\.embed_tokens\.hra_tokens"):
        hra_fx.set_adapter(model, ["a", "b"])
    again = copy.deepcopy(model)
    hra_fx.set_adapter(again, "b")
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(again), other)
    with pytest.raises(AdapterError, match="rows of 'b' need another copy"), torch.no_grad():
        model(IDS, adapter_names=["a", "b"])
    with pytest.raises(AdapterError, match="trained copies of modules, biases or tokens"):
        hra_fx.combine(model, ["a", "b"], "ab")
    lines = [
        f"model.embed_tokens: {n} tokens, {32 * n} parameters (adapter {name})" for name, n in (("a", 2), ("b", 3))
    ]
    assert [*hra_fx.report(model).trained_tokens] == lines
    assert lines[1] in str(hra_fx.report(model))
    folded = hra_fx.fold(model, "a")
    hra_fx.set_adapter(folded, [])
    hra_fx.reset_adapters(folded, "b")
    rows = folded.model.embed_tokens.hra_tokens.hra_saved.b.trainable_tokens_delta
    torch.testing.assert_close(rows, folded.model.embed_tokens.weight[[7, 5, 3]], rtol=0, atol=0)


class Reads(nn.Module):
    """It reads the weight of its output layer and does not call the layer, as the fused losses of TRL and Liger do."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.fc, self.lm_head = nn.Embedding(50, 6), nn.Linear(6, 6), nn.Linear(6, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        weight: Any = self.get_output_embeddings().weight
        return self.fc(self.embed_tokens(ids)) @ weight.T


class Writes(Reads):
    def forward(self, ids: Tensor) -> Tensor:
        self.lm_head.weight.clamp_(max=1.0)
        return super().forward(ids)


@pytest.mark.parametrize("tokens", [{"embed_tokens": NEW}, {"embed_tokens": NEW, "lm_head": [7, 41]}])
def test_code_that_reads_the_weight(tokens: dict[str, list[int]]) -> None:
    """The folded model, whose weights are trained in full, has the same outputs and gradients."""
    base = nn.Sequential(Reads(tied="lm_head" not in tokens), nn.Linear(50, 8))
    model: Any = hra_fx.transform(copy.deepcopy(base), config("1", r=2, trainable_token_indices=tokens))
    randomise_all(model, "default", 1)
    dense: Any = hra_fx.fold(copy.deepcopy(model)).requires_grad_(True)
    pairs = ((model, dense), (model[0], dense[0]), (torch.compile(model, backend="eager"), dense))
    for mine, theirs in pairs:  # the second is a part that is called alone
        outputs = mine(IDS), theirs(IDS)
        torch.testing.assert_close(*outputs, **CLOSE)
        for one, output in zip((model, dense), outputs, strict=True):
            one.zero_grad()
            output.square().sum().backward()
        for name, indices in tokens.items():
            rows = model[0].get_submodule(name).hra_tokens.trainable_tokens_delta
            torch.testing.assert_close(rows.grad, dense[0].get_submodule(name).weight.grad[indices], **CLOSE)
    head = model[0].lm_head
    assert head.weight is head._parameters["weight"]
    torch.testing.assert_close(hra_fx.effective_weight(head), dense[0].lm_head.weight, rtol=0, atol=0)
    with hra_fx.disable_adapters(model):
        torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=0)


def limited() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, 6))


@pytest.mark.parametrize(
    ("model", "tokens", "fields", "reason"),
    [
        (llama, [64], {}, "model.embed_tokens has 64 rows, so it has no token 64"),
        (llama, {"wte": [1]}, {}, "the model has no module 'wte'"),
        (llama, {"norm": [1]}, {}, "it is not an nn.Embedding or nn.Linear"),
        (llama, {"q_proj": [1]}, {}, "an adapter reflects it (target_modules)"),
        (llama, [1], {"modules_to_save": ["embed_tokens"]}, "tokens of it are trained (trainable_token_indices)"),
        (MODELS["tied"], {"lm_head": [1], "embed_tokens": [2]}, {}, "both must have the same tokens"),
        (Writes, [1], {"target_modules": ["fc"]}, "the code of the model writes into its weight"),
        (limited, {"0": [1]}, {"target_modules": ["1"]}, "it has max_norm"),
    ],
)
def test_refused(model: Any, tokens: Any, fields: dict[str, Any], reason: str) -> None:
    settings = config(**{"target_modules": ["q_proj"], "trainable_token_indices": tokens} | fields)
    assert reason in refused(model(), settings, HRAError)


@pytest.mark.needs("transformers>=5.6")
def test_what_cannot_have_tokens_says_so(tmp_path: Path) -> None:
    model, replaced, path = ours("tied", NEW), ours("tied", NEW), str(tmp_path / "a")
    replaced.set_input_embeddings(nn.Embedding(64, 32))
    hra_fx.save_adapter(model, path)
    MODELS["tied"]().save_pretrained(tmp_path / "base")
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6)))
    refusing: list[tuple[str, Any]] = [
        (
            "trains tokens (trainable_token_indices=[41, 40])",
            lambda: hra_fx.fold_checkpoint(tmp_path / "base", path, "x"),
        ),
        ("trains tokens (trainable_token_indices=[41, 40])", lambda: convert_files([path], tmp_path / "base", "x")),
        ("weights of layers, not biases, tokens or", lambda: hra_fx.save_as_lora(model, tmp_path / "a.gguf")),
        ("embed_tokens.hra_tokens: an adapter has a trained copy", lambda: model.resize_token_embeddings(80)),
        ("model.embed_tokens does not match the adapter's conf", lambda: hra_fx.save_adapter(replaced, tmp_path / "r")),
        ("tokens of it are trained", lambda: hra_fx.add_adapter(model, "b", config("lm_head"))),
        ("bias, modules_to_save, tokens", lambda: hra_fx.load_adapter(ours("tied", [40, 41]), path)),
        ("Use eager mode", lambda: hra_fx.transform(graph, config("1", trainable_token_indices={"0": [1]}))),
        ("Use eager mode", lambda: hra_fx.transform(llama(), hra_fx.HRAConfig.from_pretrained(path), trace=True)),
    ]
    for reason, call in refusing:
        with pytest.raises(HRAError, match=re.escape(reason)):
            call()
