"""Adapt SmolLM2 to 20 Newsgroups, keep what it knows, and serve the result as a LoRA.

    python examples/smollm2_newsgroups.py

It uses the weights of SmolLM2-135M-Instruct and takes about six minutes on two cores. The model learns to continue
posts of 20 Newsgroups twice, from the same start and on the same batches: plainly, and with the distance to its base on
texts that it writes itself (`hra_fx.own_texts` and `hra_fx.distance_to_base`). No other data is needed to keep what it
knows, which three scores measure before and after: the perplexity of Grimm's tales and of tweets, and the facts that it
completes. The kept adapter becomes a LoRA for llama.cpp, over the quantized file of the base model; the folded model is
a plain transformers model, for ONNX Runtime and others.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _quiet  # noqa: F401
import torch
import transformers
from _data import corpus, newsgroups, smollm2
from _facts import FACTS
from _llama_cpp import llama_cpp_text
from _shared import (
    WHEELS_NOTE,
    check_fold,
    check_onnx,
    console,
    epochs_of,
    export_onnx,
    fit,
    introduce,
    onnx_model,
    reflections,
    require,
    show,
    show_checks,
    show_files,
    track,
    write_adapters,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hra_fx

LENGTH = 64
BATCH = 4
LR = 1e-2  # the best rate of docs/results.md
#: Rows of own texts in each step.
KEPT = 2
SENTENCES = ("The capital of France is", "Once upon a time")
WORDS = 12
CONFIG = hra_fx.HRAConfig(
    r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)


class Texts(NamedTuple):
    """Token ids, int64 `(texts, LENGTH)`: posts to train on, and what is scored."""

    train: Tensor
    posts: Tensor
    tales: Tensor
    tweets: Tensor


class Logits(nn.Module):
    """A language model as a function of token ids: `(batch, length)` to `(batch, length, vocabulary)`."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap a language model, adapted or not."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """The logits, without a KV cache."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def load(train: int, test: int) -> tuple[transformers.PreTrainedModel, Any, Texts]:
    """The model in float32, its tokenizer, and texts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(**smollm2(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**smollm2())
    posts = [(newsgroups(split, 2 * size)[0], size) for split, size in (("train", train), ("test", test))]
    others = [
        ([row["Content"] for row in corpus(name)], test) for name in ("grimm-tales-selected", "election-tweets-2016")
    ]
    return model.eval(), tokenizer, Texts(*(passages(tokenizer, *texts) for texts in (*posts, *others)))


def passages(tokenizer: Any, texts: list[str], count: int) -> Tensor:
    """Passages of the beginnings of texts: int64 `(count, LENGTH)`."""
    chosen = random.Random(0).sample(texts, len(texts))
    ids = tokenizer("\n".join(text[:400] for text in chosen[: 4 * count]))["input_ids"]
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss of the next token."""
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def scores(name: str, model: nn.Module, tokenizer: Any, texts: Texts) -> tuple[str, float, float, float, float]:
    """The perplexity of held-out posts, of tales and of tweets, and the percentage of facts that a model completes."""
    batches = [(kind, part) for kind in ("posts", "tales", "tweets") for part in getattr(texts, kind).split(2 * BATCH)]
    losses: dict[str, list[Tensor]] = {}
    for kind, part in track(batches, f"evaluate {name}"):
        losses.setdefault(kind, []).append(loss_of(model, part))
    posts, tales, tweets = (float(torch.stack(values).mean().exp()) for values in losses.values())
    known = sum(completes(model, tokenizer, *fact) for fact in FACTS)
    return name, posts, tales, tweets, 100 * known / len(FACTS)


def completes(model: nn.Module, tokenizer: Any, prompt: str, answer: str) -> bool:
    """Whether the most likely next tokens are the answer."""
    ids = tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
    wanted = ids[0, len(tokenizer(prompt)["input_ids"]) :]
    predicted = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(wanted) :].argmax(dim=-1)
    return bool((predicted == wanted).all())


def train(name: str, model: nn.Module, posts: Tensor, own_texts: list[dict[str, Tensor]]) -> None:
    """One pass over the posts. With own texts, the loss has the distance to the base on some of them."""
    kept = itertools.cycle(own_texts)

    def loss(batch: list[int]) -> Tensor:
        plain = loss_of(model, posts[batch])
        return plain + hra_fx.distance_to_base(model, next(kept)) if own_texts else plain

    fit(loss, [(reflections(model), LR)], epochs_of(len(posts), 1, BATCH), f"train {name}")


def continued(model: transformers.PreTrainedModel, tokenizer: Any) -> list[str]:
    """What the model adds to each of `SENTENCES` by greedy decoding."""
    said = []
    for sentence in SENTENCES:
        inputs = tokenizer(sentence, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        said.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def served(adapter: Path, tokenizer: Any) -> list[str]:
    """The same in llama.cpp, with an adapter over the quantized base model."""
    files = smollm2()
    base = Path(files["pretrained_model_name_or_path"], files["gguf_file"])
    return [llama_cpp_text(base, adapter, tokenizer(sentence)["input_ids"], WORDS) for sentence in SENTENCES]


def ship(model: transformers.PreTrainedModel, keys: list[str], ids: Tensor, output: Path) -> list[str]:
    """Fold the adapter, export the result, and say what was checked."""
    function = Logits(model)
    with torch.no_grad():
        adapted = function(ids)
        hra_fx.fold(model)
        folded = function(ids)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    export_onnx(function, {"input_ids": ids[:2, :24]}, {"input_ids": axes}, output / "smollm2.onnx")
    run: Callable[..., Tensor] = onnx_model(output / "smollm2.onnx")
    return [
        check_fold(folded, adapted, model, keys),
        check_onnx(run, function, {"input_ids": ids}, f"batch {len(ids)}, length {LENGTH}"),
    ]


def main(train_size: int, test_size: int, output: Path) -> None:
    """Run the demo, and write the results to `output`."""
    began = time.perf_counter()
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    introduce(
        f"SmolLM2 learns to continue posts of 20 Newsgroups: {train_size} passages, {test_size} held out", WHEELS_NOTE
    )
    model, tokenizer, texts = load(train_size, test_size)
    keys, size = list(model.state_dict()), sum(parameter.numel() for parameter in model.parameters())
    rows = [scores("base", model, tokenizer, texts)]
    said = {"base": continued(model, tokenizer)}

    written = hra_fx.own_texts(model, count=min(64, train_size), length=LENGTH, batch_size=32)
    own_texts = [{"input_ids": rows} for batch in written for rows in batch["input_ids"].split(KEPT)]
    model = hra_fx.transform(model, CONFIG)
    start = copy.deepcopy(model)
    for name, kept in (("plain", []), ("kept", own_texts)):
        model = copy.deepcopy(start)
        train(name, model, texts.train, kept)
        rows.append(scores(name, model, tokenizer, texts))
        said[name] = continued(model, tokenizer)

    write_adapters(model, {"input_ids": texts.posts[:2, :24], "use_cache": False}, output)
    lora = hra_fx.save_as_lora(model, output / "adapter.gguf", dtype="float16")
    said["kept, in llama.cpp"] = served(lora.path, tokenizer)
    checks = ship(model, keys, texts.posts[:4], output)
    said["kept, folded"] = continued(model, tokenizer)
    require(said["kept, folded"] == said["kept"], f"the folded model continues with the same words: {said}")
    checks.append(f"LoRA in float16: {lora.path.stat().st_size / 1e6:.1f} MB")
    report(rows, said, checks, size)
    files = {
        "adapter.gguf": "the adapter as a LoRA, for llama.cpp",
        "smollm2.onnx": "the folded model, for ONNX Runtime",
    }
    show_files(output, files, time.perf_counter() - began)


def report(
    rows: list[tuple[str, float, float, float, float]], said: dict[str, list[str]], checks: list[str], size: int
) -> None:
    """Print the scores, the texts and the checks."""
    show(
        f"SmolLM2 ({size:,} parameters): perplexity of held-out posts, and what it still knows",
        ("trained", "new posts", "tales", "tweets", "facts"),
        [(name, *(f"{value:.1f}" for value in values), f"{known:.0f}%") for name, *values, known in rows],
    )
    console.print(
        "  plain: trained on the posts alone. kept: with the distance to the base on texts that the model wrote.\n"
        "  tales, tweets: perplexity; no run trains on them. facts: completed right, such as the capital of France."
    )
    for place, sentence in enumerate(SENTENCES):
        show(
            f"{sentence!r}, continued by", ("model", "text"), [(name, repr(all_[place])) for name, all_ in said.items()]
        )
    if said["kept, in llama.cpp"] != said["kept"]:
        console.print("  llama.cpp may choose another word: it rounds to 8 bits what it multiplies with 4-bit weights.")
    show_checks(checks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=192, help="passages to train on (default 192)")
    parser.add_argument("--test", type=int, default=48, help="passages of each kind to score (default 48)")
    parser.add_argument("--output", type=Path, default=Path("demo_output/language"), help="folder to write to")
    arguments = parser.parse_args()
    main(arguments.train, arguments.test, arguments.output)
