"""MiniLM as a classifier of 20 Newsgroups."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
import transformers
from _data import corpus, minilm_folder, newsgroups
from finetune_and_fold import MAX_TOKENS, Classifier, Texts
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from learning.tasks.task import Batch, Task, accuracy

VALIDATION, TEST = 500, 1500


class Newsgroups(Task):
    """MiniLM, 1600 texts of 20 Newsgroups, two passes; percent of held-out texts whose group is found."""

    name: ClassVar[str] = "newsgroups-1600"
    metric: ClassVar[str] = "accuracy, %"
    higher_is_better: ClassVar[bool] = True
    targets: ClassVar[list[str]] = [
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    lora_rank: ClassVar[int] = 4
    head: ClassVar[str | None] = "head"
    head_lr: ClassVar[float] = 3e-3
    batch_size: ClassVar[int] = 16
    epochs: ClassVar[int] = 2
    bfloat16: ClassVar[bool] = True
    texts: ClassVar[int] = 1600

    def __init__(self, seed: int, *, tiny: bool = False) -> None:
        """Tokenize the texts of this seed, and those held out."""
        super().__init__(seed, tiny=tiny)
        held_out, held_out_labels, pool, pool_labels = split_texts()
        chosen = random.Random(seed).sample(range(len(pool)), 32 if tiny else self.texts)
        self.examples = tokenize([pool[index] for index in chosen], pool_labels[chosen])
        few = slice(0, 16) if tiny else slice(None)
        self.held_out = tokenize(held_out[few], held_out_labels[few])

    @property
    def size(self) -> int:
        """The number of training texts."""
        return len(self.examples.ids)

    def model(self) -> nn.Module:
        """The encoder with a head, without dropout."""
        torch.manual_seed(self.seed)
        return Classifier(20).eval()

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The token ids and the mask."""
        return self.examples.batch(batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        return cross_entropy(model(**self.model_inputs(batch)), self.examples.labels[batch])

    def validate(self, model: nn.Module) -> float:
        """Accuracy on 500 texts of the training split that no seed trains on."""
        return score(model, self.held_out)

    def test(self, model: nn.Module) -> float:
        """Accuracy on 1500 texts of the test split."""
        texts, labels, _ = newsgroups("test", 16 if self.tiny else TEST)
        return score(model, tokenize(texts, labels))


class MoreNewsgroups(Newsgroups):
    """The same with 5000 texts and one pass."""

    name: ClassVar[str] = "newsgroups-5000"
    epochs: ClassVar[int] = 1
    texts: ClassVar[int] = 5000


class Retrieval(Newsgroups):
    """The same with the posts of ten groups; what it retains is the retrieval of posts of the ten others."""

    name: ClassVar[str] = "newsgroups-retrieval"
    texts: ClassVar[int] = 800

    def __init__(self, seed: int, *, tiny: bool = False) -> None:
        """Tokenize the texts of this seed, and those held out."""
        Task.__init__(self, seed, tiny=tiny)
        groups = random.Random(seed).sample(range(20), 20)
        new, other = torch.tensor(groups[:10]), torch.tensor(groups[10:])
        texts, labels = texts_of("train")
        chosen = random.Random(seed).sample(range(len(texts)), len(texts))
        few, held = (32, 16) if tiny else (self.texts, VALIDATION)
        wanted = [index for index in chosen if labels[index] in new][: few + held]
        kept = [index for index in chosen if labels[index] in other][:64]
        self.held_out, self.examples = (pick(texts, labels, part, new) for part in (wanted[:held], wanted[held:]))
        self.kept = pick(texts, labels, kept, other)
        texts, labels = texts_of("test")
        order = range(200 if tiny else len(texts))
        self.unseen = pick(texts, labels, [index for index in order if labels[index] in new][:TEST], new)
        self.others = pick(texts, labels, [index for index in order if labels[index] in other][:1000], other)

    def model(self) -> nn.Module:
        """The encoder with a head, without dropout."""
        torch.manual_seed(self.seed)
        return Classifier(10).eval()

    def test(self, model: nn.Module) -> float:
        """Accuracy on 1500 texts of the test split."""
        return score(model, self.unseen)

    @torch.no_grad()
    def retention(self, model: Any) -> dict[str, float]:
        """The percentage of texts of the other groups whose nearest neighbor is of the same group."""
        found = nn.functional.normalize(apply(model.embed, self.others), dim=1)
        nearest = (found @ found.T).fill_diagonal_(-1).argmax(dim=1)
        labels = self.others.labels
        return {"retrieval, %": 100 * float((labels[nearest] == labels).double().mean())}

    def to_keep(self, count: int, kind: str = "", rows: int = 8) -> list[dict[str, Tensor]]:
        """Texts of the other groups that are not tested, or of tales."""
        texts = tales(count) if kind == "other" else self.kept
        return [texts.batch(list(range(start, start + rows))) for start in range(0, count, rows)]

    def distance(self, model: Any, batch: Any) -> Tensor:
        """The same of the embeddings, because the head is new."""
        with torch.no_grad():
            wanted = base_model().embed(**batch)
        return ((model.embed(**batch) - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()

    def rehearsal_loss(self, model: Any, step: int) -> Tensor:
        """The mean squared error of embeddings, to those of the base model."""
        batch = self.kept.batch([(step * self.batch_size + place) % 64 for place in range(self.batch_size)])
        with torch.no_grad():
            wanted = base_model().embed(**batch)
        return nn.functional.mse_loss(model.embed(**batch), wanted)


def tales(count: int) -> Texts:
    """Passages of Andersen's tales."""
    texts = [row["Content"][start : start + 300] for row in corpus("andersen") for start in range(0, 3000, 300)]
    return tokenize(random.Random(0).sample(texts, count), torch.zeros(count, dtype=torch.int64))


@cache
def base_model() -> Classifier:
    """The encoder before training."""
    return Classifier(1).eval().requires_grad_(False)


@cache
def texts_of(split: str) -> tuple[list[str], Tensor]:
    """Texts of a split and their groups."""
    texts, labels, _ = newsgroups(split, 10_000 if split == "train" else 7_000)
    return texts, labels


def pick(texts: list[str], labels: Tensor, indices: list[int], groups: Tensor) -> Texts:
    """Some texts, and the places of their groups among `groups`."""
    places = (labels[indices][:, None] == groups).int().argmax(dim=1)
    return tokenize([texts[index] for index in indices], places)


@cache
def split_texts() -> tuple[list[str], Tensor, list[str], Tensor]:
    """Texts of the training split and their classes: 500 to validate with, and those to train on."""
    texts, labels, _ = newsgroups("train", 11_000)
    return texts[:VALIDATION], labels[:VALIDATION], texts[VALIDATION:], labels[VALIDATION:]


def tokenize(texts: list[str], labels: Tensor) -> Texts:
    """The first tokens of each text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    ids = tokenizer([text[:2000] for text in texts], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return Texts(ids, labels)


@torch.no_grad()
def apply(function: Callable[..., Tensor], texts: Texts) -> Tensor:
    """A function of batches, for all texts."""
    indices = list(range(len(texts.ids)))
    batches = [indices[start : start + 64] for start in range(0, len(indices), 64)]
    return torch.cat([function(**texts.batch(batch)) for batch in batches])


def score(model: nn.Module, texts: Texts) -> float:
    """Accuracy in percent."""
    return accuracy(apply(model, texts), texts.labels)
