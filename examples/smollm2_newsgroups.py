"""Adapt SmolLM2 to 20 Newsgroups with Householder reflections, fold them into its weights, and serve the result.

    python examples/smollm2_newsgroups.py

It uses the weights of SmolLM2-135M-Instruct and takes a few minutes on two cores. Every attention and MLP projection is
adapted, with about 1% of the parameters, and the model learns to continue posts of 20 Newsgroups. The adapter becomes a
LoRA for llama.cpp, over the quantized file of the base model; the folded model is a plain transformers model, for
ONNX Runtime and others. All of them continue a sentence with the same words.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import _quiet  # noqa: F401
import torch
import transformers
from _data import newsgroups, smollm2
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
    largest_difference,
    onnx_model,
    reflections,
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

LENGTH = 64
BATCH = 8
LR = 5.5e-3  # the best rate of docs/results.md
SENTENCE = "The capital of France is"
WORDS = 12
CONFIG = hra_fx.HRAConfig(
    r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)


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


def load() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The model in float32, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(**smollm2(), dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**smollm2())


def posts(tokenizer: transformers.PreTrainedTokenizerBase, split: str, size: int) -> Tensor:
    """The beginnings of random posts that are long enough to need no padding: int64 `(size, LENGTH)`."""
    texts, _, _ = newsgroups(split, 2 * size)
    ids = tokenizer([text[:2000] for text in texts], truncation=True, max_length=LENGTH)["input_ids"]
    return torch.tensor([row for row in ids if len(row) == LENGTH][:size])


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean next-token loss."""
    return cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, label: str) -> float:
    """The perplexity over all posts."""
    losses = [loss_of(model, part) * len(part) for part in track(ids.split(BATCH), label)]
    return float((torch.stack(losses).sum() / len(ids)).exp())


@torch.no_grad()
def continued(run: Callable[..., Tensor], tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Continue `SENTENCE` by greedy decoding."""
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    for _ in range(WORDS):
        ids = torch.cat([ids, run(input_ids=ids)[:, -1:].argmax(dim=-1)], dim=1)
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text


def served(adapter: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Continue `SENTENCE` in llama.cpp, with an adapter over the quantized base model."""
    files = smollm2()
    base = Path(files["pretrained_model_name_or_path"], files["gguf_file"])
    return SENTENCE + llama_cpp_text(base, adapter, tokenizer(SENTENCE)["input_ids"], WORDS)


def main(train_size: int, test_size: int, output: Path) -> None:
    """Run the demo, and write the results to `output`."""
    began = time.perf_counter()
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    introduce(
        f"SmolLM2 learns to continue posts of 20 Newsgroups: {train_size} posts, {test_size} held out",
        WHEELS_NOTE,
    )

    base, tokenizer = load()
    train_posts, test_posts = posts(tokenizer, "train", train_size), posts(tokenizer, "test", test_size)
    keys, size = list(base.state_dict()), sum(parameter.numel() for parameter in base.parameters())
    model, some = Logits(base), test_posts[:4]
    texts = {"base": continued(model, tokenizer)}
    require("Paris" in texts["base"], "the weights are those of SmolLM2, which knows the capital of France")
    before = perplexity(model, test_posts, "evaluate base")
    with torch.no_grad():
        start = model(some)

    hra_fx.transform(base, CONFIG)
    trained = trainable(base)
    batches = epochs_of(len(train_posts), 1, BATCH)
    groups = [(reflections(base), LR)]
    fit(lambda batch: loss_of(model, train_posts[batch]), groups, batches, "train HRA")
    after = perplexity(model, test_posts, "evaluate HRA")
    require(after < before, f"the perplexity of held-out posts is lower ({before:.1f} before, {after:.1f} after)")
    with torch.no_grad():
        adapted = model(some)
    texts["adapted"] = continued(model, tokenizer)
    write_adapters(base, {"input_ids": some[:2, :24], "use_cache": False}, output)
    before_lora = time.perf_counter()
    lora = hra_fx.save_as_lora(base, output / "adapter.gguf", dtype="float16")
    lora_seconds = time.perf_counter() - before_lora
    texts["adapted, in llama.cpp"] = served(lora.path, tokenizer)

    hra_fx.fold(base)
    with torch.no_grad():
        folded = model(some)
    texts["folded"] = continued(model, tokenizer)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    export_onnx(model, {"input_ids": some[:2, :24]}, {"input_ids": axes}, output / "smollm2.onnx")
    run = onnx_model(output / "smollm2.onnx")
    texts["folded, in ONNX Runtime"] = continued(run, tokenizer)
    checks = [
        f"Adapted: logits moved by up to {largest_difference(adapted, start):.1f}",
        check_fold(folded, adapted, base, keys),
        check_onnx(run, model, {"input_ids": some}, f"batch {len(some)}, length {LENGTH}"),
    ]
    same = texts["adapted"] == texts["folded"] == texts["folded, in ONNX Runtime"]
    require(same, f"all models continue the sentence with the same words: {texts}")
    rough = max(row.rounding for row in lora.rows)
    made = f"{lora.path.stat().st_size / 1e6:.1f} MB in {lora_seconds:.1f} s"
    checks.append(f"LoRA in float16, {made}: largest error of a weight's change {rough:.1e}")

    show(
        f"SmolLM2 ({size:,} parameters), {len(train_posts)} posts to train on, {len(test_posts)} held out",
        ("model", "perplexity of held-out posts", "trained parameters"),
        [("base", f"{before:.1f}", "0"), ("HRA, r = 8", f"{after:.1f}", f"{trained:,}")],
    )
    show_checks(checks)
    said = [(name, repr(text.removeprefix(SENTENCE))) for name, text in texts.items()]
    show(f"{SENTENCE!r}, continued by", ("model", "text"), said)
    if texts["adapted, in llama.cpp"] != texts["adapted"]:
        console.print("  llama.cpp chose another word: it rounds to 8 bits what it multiplies with the 4-bit weights.")
    files = {
        "adapter.gguf": "the adapter as a LoRA, for llama.cpp",
        "smollm2.onnx": "the folded model, for ONNX Runtime",
    }
    show_files(output, files, time.perf_counter() - began)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=256, help="posts to train on (default 256)")
    parser.add_argument("--test", type=int, default=64, help="held-out posts (default 64)")
    parser.add_argument("--output", type=Path, default=Path("demo_output/language"), help="folder to write to")
    arguments = parser.parse_args()
    main(arguments.train, arguments.test, arguments.output)
