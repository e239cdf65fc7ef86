"""What `protect` takes as samples. The oracle: each text alone, without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_models import built
from tiny import bert, llama, t5
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training.test_protect import EXPERTS, F64, adapted
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

import hra_fx
from hra_fx.errors import AdapterError

NAMES = ["input_ids", "attention_mask"]
TEXTS = [[5, 9, 2], [7, 7], [4, 11, 8]]
LINEAR = {"target_modules": "all-linear"}
#: name -> (model, fields of its configuration)
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Llama": (llama, LINEAR),
    "BERT": (bert, LINEAR),
    "experts": (lambda: built("mixtral"), EXPERTS),
}


def kept(model: nn.Module, samples: Any, directions: int = 8, **options: Any) -> dict[str, Tensor]:
    """Path -> the projector on the directions."""
    found = hra_fx.protect(model, samples, directions, **options)
    return {path: basis @ basis.mT for path, basis in found.directions.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for path, projector in wanted.items():
        torch.testing.assert_close(found[path], projector)


def padded(rows: list[list[int]], side: str, value: int = 3) -> tuple[Tensor, Tensor]:
    """The rows with padding, and their mask."""
    length = max(map(len, rows))
    gaps = [[value] * (length - len(row)) for row in rows]
    pairs = list(zip(rows, gaps, strict=True))
    ids = [gap + row if side == "left" else row + gap for row, gap in pairs]
    mask = [
        [0] * len(gap) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(gap) for row, gap in pairs
    ]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_is_left_out(name: str, side: str) -> None:
    make, fields = MODELS[name]
    model = adapted(make().to(F64), **fields)
    wanted = kept(model, [{"input_ids": torch.tensor([row])} for row in TEXTS])
    ids, mask = padded([*TEXTS, []], side)
    labels = {} if name == "BERT" else {"labels": ids}
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(3).expand(4, 3), **labels}
    if side == "left":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    same(kept(model, [batch]), wanted)


@pytest.mark.parametrize("given", ["decoder_attention_mask", "labels"])
def test_padding_of_a_decoder_is_left_out(given: str) -> None:
    model = adapted(t5(is_gated_act=False).to(F64), **LINEAR)
    answers = [[6, 1], [9, 3, 12, 1], [2, 1]]
    samples = [
        {"input_ids": torch.tensor([row]), "labels": torch.tensor([answer])}
        for row, answer in zip(TEXTS, answers, strict=True)
    ]
    wanted = kept(model, samples, 4)
    (ids, mask), (labels, decoded) = padded(TEXTS, "right"), padded(answers, "right", -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if given == "decoder_attention_mask":
        del batch["labels"]
        inputs = torch.cat([torch.zeros(3, 1).long(), labels[:, :-1]], dim=1)
        batch |= {"decoder_input_ids": inputs.clamp(min=0), "decoder_attention_mask": decoded}
    same(kept(model, [batch], 4), wanted)


def tokenizer() -> Any:
    words = {f"w{number}": number for number in range(64)}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w3")


def test_samples_are_batches_a_loader_rows_of_a_dataset_or_texts() -> None:
    model = adapted(llama().to(F64), **LINEAR)
    texts = [" ".join(f"w{number}" for number in row) for row in TEXTS]
    wanted = kept(model, [torch.tensor([row]) for row in TEXTS])
    rows = [{"input_ids": row, "attention_mask": [1] * len(row), "label": 1, "text": text, "length": [len(row)]}
            for row, text in zip(TEXTS, texts, strict=True)]  # fmt: skip
    encoded = tokenizer()(texts)
    collate = DataCollatorWithPadding(tokenizer())
    few = [{"input_ids": row} for row in TEXTS]
    for samples in (
        [*rows, {**rows[0], "input_ids": [], "attention_mask": []}],
        iter(rows),
        [{"input_ids": torch.tensor(row)} for row in TEXTS],
        [(torch.tensor([row]),) for row in TEXTS],
        [padded(TEXTS, "right")],  # the mask is the second argument
        [{name: value.numpy() for name, value in zip(NAMES, padded(TEXTS, "right"), strict=True)}],
        [tokenizer()(texts, padding=True, return_tensors="pt")],
        DataLoader(few, batch_size=2, collate_fn=collate),  # type: ignore[arg-type]
    ):
        same(kept(model, samples), wanted)
    same(kept(model, texts, tokenizer=tokenizer()), wanted)
    with pytest.raises(AdapterError, match=r"`input_ids` of a row must be one list of tokens, got shape \(2, 2\)"):
        kept(model, [{"input_ids": [[1, 2], [3, 4]]}])
    with pytest.raises(AdapterError, match=r"a row of `samples` has no lists of numbers, only messages\. Tokenize it"):
        kept(model, [{"messages": [{"role": "user", "content": "w5 w6"}]}])
    with pytest.raises(AdapterError, match=r"such as a list, got BatchEncoding"):
        kept(model, encoded)


def test_labels_of_images_are_ignored_and_without_samples_the_model_writes_texts() -> None:
    model = adapted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)), "0", "2")
    images = torch.randn(3, 3, 4, 4)
    same(kept(model, [(images, torch.tensor([0, 1, 0]))], 4), kept(model, [images], 4))
    with pytest.raises(AdapterError, match=r"own_texts needs a causal language model, got Sequential\. Pass `samples`"):
        hra_fx.protect(model, directions=2)
    writer = adapted(llama(), **LINEAR)
    same(kept(writer, None), kept(writer, hra_fx.own_texts(writer)))


def test_padding_that_cannot_be_taken_out_is_refused() -> None:
    model = adapted(llama(), **LINEAR)
    ids, mask = padded(TEXTS, "right")
    shape = r"^`attention_mask` must have shape \(batch, length\), with 1 for tokens and 0 f"
    for batch, message in (
        ({"pixel_values": torch.randn(2, 5)}, r"^pixel_values: .* not a tensor with 3 rows\. Pass one sample per"),
        ({"cache": [torch.randn(3, 5)]}, r"^cache: the batch has padding .* Pass one sample per batch, without"),
        ({"attention_mask": torch.tensor([[1, 0, 1]] * 3)}, shape),
        ({"attention_mask": torch.zeros(3, 1, 3, 3)}, shape),
        ({"attention_mask": (mask - 1) * 1e9}, shape),
    ):
        with pytest.raises(AdapterError, match=message):
            hra_fx.protect(model, [{"input_ids": ids, "attention_mask": mask, **batch}], 4)
