"""SmolLM2 on posts of 20 Newsgroups, and what it forgets."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import transformers
from _data import corpus, newsgroups, smollm2
from _facts import FACTS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hra_fx
from learning.tasks.task import CACHE, Batch, Task

LENGTH = 64
VALIDATION, TEST, TALES = 48, 64, 48


class Language(Task):
    """SmolLM2-135M, 256 posts of 64 tokens, one pass; perplexity of held-out posts.

    What it retains: the perplexity of Grimm's tales, and how many facts it completes as it did before.
    """

    name: ClassVar[str] = "language"
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    targets: ClassVar[list[str]] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora_rank: ClassVar[int] = 4
    batch_size: ClassVar[int] = 4
    epochs: ClassVar[int] = 1
    bfloat16: ClassVar[bool] = True
    scales: ClassVar[Sequence[float]] = (0.75, 0.5)
    posts: ClassVar[int] = 256

    def __init__(self, seed: int, *, tiny: bool = False) -> None:
        """Tokenize the posts of this seed, and those held out."""
        super().__init__(seed, tiny=tiny)
        ids = tokenized("train", 100 if tiny else 3000)
        chosen = random.Random(seed).sample(range(VALIDATION, len(ids)), 8 if tiny else self.posts)
        self.ids = ids[chosen]
        self.held_out = ids[: 4 if tiny else VALIDATION]

    @property
    def size(self) -> int:
        """The number of training posts."""
        return len(self.ids)

    def model(self) -> nn.Module:
        """The model in float32."""
        if self.tiny:
            torch.manual_seed(self.seed)
            return transformers.AutoModelForCausalLM.from_config(config(num_hidden_layers=1)).eval()
        return copy.deepcopy(pretrained())

    def model_inputs(self, batch: Batch) -> Tensor:
        """The token ids."""
        return self.ids[batch]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of the next token."""
        return next_token_loss(model, self.model_inputs(batch))

    def validate(self, model: nn.Module) -> float:
        """Perplexity of 48 posts of the training split that no seed trains on."""
        return perplexity(model, self.held_out)

    def test(self, model: nn.Module) -> float:
        """Perplexity of 64 posts of the test split."""
        return perplexity(model, tokenized("test", 20 if self.tiny else 400)[:TEST])

    def retention(self, model: nn.Module) -> dict[str, float]:
        """Perplexity of tales, and percent of the facts that are completed right."""
        known = facts()[: 2 if self.tiny else None]
        return {
            "perplexity of tales": perplexity(model, tales()[: 2 if self.tiny else TALES]),
            "facts, %": 100 * sum(completes(model, *fact) for fact in known) / len(known),
            "perplexity of tweets": perplexity(model, tweets(2 if self.tiny else TALES, seed=0)),
        }

    def to_keep(self, count: int, kind: str = "", rows: int = 8) -> list[Tensor]:
        """Tales that are not tested, tweets, texts of the model, or random tokens."""
        if kind == "random":
            ids = torch.randint(17, 49152, (count, LENGTH), generator=torch.Generator().manual_seed(7))
        elif kind == "own":
            ids = torch.randint(17, 49152, (count, LENGTH)) if self.tiny else own_texts()[:count]
        else:
            ids = tweets(count, seed=1) if kind == "other" else tales_to_keep(count)
        return list(ids.split(rows))

    def rehearsal_loss(self, model: nn.Module, step: int) -> Tensor:
        """The mean loss of the next token of tales that are not tested."""
        return next_token_loss(model, tales_to_keep(64).split(self.batch_size)[step])


class Long(Language):
    """The same with 1536 posts and two passes."""

    name: ClassVar[str] = "language-long"
    posts: ClassVar[int] = 1536
    epochs: ClassVar[int] = 2
    curve_steps: ClassVar[int] = 64


class MoreSteps(Language):
    """The same with four times as many posts."""

    name: ClassVar[str] = "language-256-steps"
    scales: ClassVar[Sequence[float]] = ()
    posts: ClassVar[int] = 1024


class MLP(Language):
    """The same with adapters in the MLPs alone."""

    name: ClassVar[str] = "language-mlp"
    scales: ClassVar[Sequence[float]] = ()
    targets: ClassVar[list[str]] = ["gate_proj", "up_proj", "down_proj"]
    lora_rank: ClassVar[int] = 6
    more_rank: ClassVar[dict[str, int]] = {"down_proj": 1}


class Attention(Language):
    """The same with adapters in the attention alone."""

    name: ClassVar[str] = "language-attention"
    scales: ClassVar[Sequence[float]] = ()
    targets: ClassVar[list[str]] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora_rank: ClassVar[int] = 11


class Slovene(Language):
    """The same with another language to learn."""

    name: ClassVar[str] = "language-slovene"
    scales: ClassVar[Sequence[float]] = ()

    def __init__(self, seed: int, *, tiny: bool = False) -> None:
        """Draw the passages of this seed from those that are not held out."""
        Task.__init__(self, seed, tiny=tiny)
        rows = comments()
        few = 4 if tiny else VALIDATION
        self.held_out, self.unseen, pool = rows[:few], rows[VALIDATION:][: few + 16], rows[VALIDATION + TEST :]
        self.ids = pool[random.Random(seed).sample(range(len(pool)), 8 if tiny else self.posts)]

    def test(self, model: nn.Module) -> float:
        """Perplexity of 64 other passages."""
        return perplexity(model, self.unseen)


class FourBit(Language):
    """The same with a base in NF4."""

    name: ClassVar[str] = "language-4-bit"
    bfloat16: ClassVar[bool] = False

    def model(self) -> nn.Module:
        """The model with NF4 weights in all targets."""
        model = super().model()
        for name, layer in list(model.named_modules()):
            if name.endswith(tuple(self.targets)):
                model.set_submodule(name, four_bit(layer))
        return model


class Float32(Language):
    """The same without bfloat16."""

    name: ClassVar[str] = "language-float32"
    bfloat16: ClassVar[bool] = False


class MorePasses(Language):
    """The same with four passes over the 256 posts."""

    name: ClassVar[str] = "language-4-passes"
    epochs: ClassVar[int] = 4
    curve_steps: ClassVar[int] = 64


def four_bit(layer: nn.Linear) -> nn.Module:
    """A Linear without a bias as bitsandbytes' NF4 layer that computes in float32."""
    import bitsandbytes  # type: ignore[import-untyped]

    quantized = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    quantized.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    quantized.to("cpu")  # packs the weight
    return quantized


@cache
def pretrained() -> nn.Module:
    """SmolLM2 in float32; its file takes 20 seconds to read."""
    return transformers.AutoModelForCausalLM.from_pretrained(**smollm2(), dtype=torch.float32).eval()


def config(**changes: int) -> transformers.PretrainedConfig:
    """The configuration of SmolLM2, with changes."""
    return transformers.LlamaConfig.from_dict(read_config() | changes)


@cache
def read_config() -> dict[str, Any]:
    """Its fields, which take seconds to read from the file of weights."""
    fields: dict[str, Any] = transformers.AutoConfig.from_pretrained(**smollm2()).to_dict()
    return fields


@cache
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2."""
    return transformers.AutoTokenizer.from_pretrained(**smollm2())


@cache
def tokenized(split: str, size: int) -> Tensor:
    """The beginnings of random posts that are long enough to need no padding: int64 `(posts, LENGTH)`."""
    texts, _, _ = newsgroups(split, size)
    ids = tokenizer()([text[:2000] for text in texts], truncation=True, max_length=LENGTH)["input_ids"]
    return torch.tensor([row for row in ids if len(row) == LENGTH])


def tales() -> Tensor:
    """Passages of Grimm's tales that are tested, int64 `(passages, LENGTH)`."""
    return torch.tensor(random.Random(0).sample(passages(), TALES))


def tales_to_keep(count: int = 64) -> Tensor:
    """Other passages of the tales, for `hra_fx.protect`."""
    tested = set(map(tuple, tales().tolist()))
    rest = [passage for passage in passages() if tuple(passage) not in tested]
    return torch.tensor(random.Random(1).sample(rest, count))


@cache
def passages() -> list[list[int]]:
    """All passages of Grimm's tales, as token ids."""
    rows = [tokenizer()(row["Content"])["input_ids"] for row in corpus("grimm-tales-selected")]
    return [row[start : start + LENGTH] for row in rows for start in range(0, len(row) - LENGTH, LENGTH)]


@cache
def tweets(count: int, seed: int) -> Tensor:
    """Passages of tweets of 2016, int64 `(passages, LENGTH)`; those of two seeds are of different tweets."""
    rows = random.Random(0).sample([row["Content"] for row in corpus("election-tweets-2016")], 2000)[seed::2]
    ids = tokenizer()("\n".join(rows))["input_ids"]
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


@cache
def own_texts() -> Tensor:
    """64 texts that the model writes itself, int64 `(64, LENGTH)`; kept in a file."""
    file = CACHE / "own_texts.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat([batch["input_ids"] for batch in hra_fx.own_texts(pretrained(), length=LENGTH)]), file)
    ids: Tensor = torch.load(file)
    return ids


@cache
def comments() -> Tensor:
    """Passages of Slovene comments in a random order, int64 `(passages, LENGTH)`."""
    texts = [row["Content"] for row in corpus("slo-opinion-corpus") if row["Content"]]
    ids = tokenizer()("\n".join(random.Random(0).sample(texts, len(texts))))["input_ids"]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    return torch.tensor(random.Random(0).sample(rows, len(rows)))


@cache
def facts() -> list[tuple[Tensor, Tensor]]:
    """Prompts and their continuations as tokens: int64 `(1, n)` and `(m,)`."""
    encode = tokenizer()
    return [
        (encode(prompt, return_tensors="pt")["input_ids"], torch.tensor(encode(f" {answer}")["input_ids"]))
        for prompt, answer in FACTS
    ]


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss of the next token over token ids `(batch, length)`."""
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """The perplexity over all rows."""
    losses = [next_token_loss(model, part).double() * len(part) for part in ids.split(8)]
    return float((torch.stack(losses).sum() / len(ids)).exp())


@torch.no_grad()
def completes(model: nn.Module, prompt: Tensor, answer: Tensor) -> bool:
    """Whether greedy decoding gives the answer."""
    ids = torch.cat([prompt[0], answer])[None]
    predicted = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(answer) :].argmax(dim=-1)
    return bool((predicted == answer).all())
