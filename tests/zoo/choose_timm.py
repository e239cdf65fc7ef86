"""Writes timm_table.tsv: of every timm family the smallest model, made smaller, and the images that it takes.

    PYTHONPATH=tests python -m zoo.choose_timm

Run once when timm gains families; it takes a quarter of an hour. Columns: model, keyword arguments, image size, another
image size (0: there is none).
"""

from __future__ import annotations

import gc
import re
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

TABLE = Path(__file__).with_name("timm_table.tsv")
#: Beginnings that go with the word after them.
_PREFIXES = ("tf", "legacy", "gc", "eca", "ese", "nf", "dm", "lambda", "test", "wide", "tiny")
#: Words that make another architecture, and not another size.
_WORDS = ("clip", "siglip", "dinov2", "dinov3", "rope", "srelpos", "rmlp", "pcpvt", "svt", "lite", "es", "edgetpu")
#: Ways to make a model smaller; the first one that a model takes is used.
_SMALLER: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 64, "num_heads": 4},
    {"depth": 2, "embed_dim": 64},
    {"depths": (1, 1, 1, 1), "embed_dim": 48},
    {"depths": (1, 1, 2, 1), "dims": (24, 32, 40, 48)},
    {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 64, 96)},
    {"depths": (1, 1, 1, 1)},
    {"depths": (1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {"num_blocks": 2},
    {"depth": 2},
    {},
)
#: Those that another way makes smaller.
_BY_HAND: dict[str, dict[str, Any]] = {
    "nasnetalarge": {"stem_size": 24, "num_features": 384},
    "densenet264d": {"block_config": (2, 2, 2, 2)},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1), "embed_dim": 48},
    "sam2_hiera_tiny": {"stages": (1, 1, 1, 1), "embed_dim": 48},
    "hieradet_small": {"stages": (1, 1, 1, 1), "embed_dim": 48},
    "dla102x2": {"levels": (1, 1, 1, 2, 1, 1)},
    "mobilenetv5_base": {"channel_multiplier": 0.25},
}
_LARGEST_OTHER = 384
_SIZES = (64, 96, 128, 160, 192, 224, 256, 384, 512)


def family(model: str) -> str:
    """The family of a model's name.

    >>> family("seresnext26d_32x4d"), family("swinv2_tiny_window8_256"), family("tf_efficientnet_b0")
    ('seresnext#d', 'swinv2', 'tf_efficientnet')
    """
    words, before = model.split("_"), []
    while len(words) > 1 and words[0] in _PREFIXES:
        before.append(words.pop(0))
    stem = re.sub(r"(?<![v\d])\d+(?=[a-z]{0,2}\d*$)", "#", words[0])
    return "_".join([*before, stem, *(word for word in words[1:] if word in _WORDS)])


def smallest() -> list[str]:
    """Of every family, within every file of timm, the smallest model: by parameters, and by modules."""
    best: dict[tuple[str, str], tuple[int, str]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        size = sum(p.numel() for p in model.parameters()) + 30_000 * sum(1 for _ in model.modules())
        key = (timm.model_entrypoint(name).__module__, family(name))
        best[key] = min(best.get(key, (size, name)), (size, name))
    return sorted(name for _, name in best.values())


def row(name: str) -> tuple[str, dict[str, Any], int, int]:
    """The table's row for a model.

    Raises:
        ValueError: it runs on no image.
    """
    for size in _SIZES:
        for resized in ({"img_size": size}, {}):
            for smaller in _ways(name):
                kwargs = {**smaller, **resized, "num_classes": 5}
                model = _made(name, kwargs)
                if model is not None and _runs(model, size):
                    other = next((s for s in (size + 32, size * 2) if s < _LARGEST_OTHER and _runs(model, s)), 0)
                    return name, kwargs, size, other
    raise ValueError(f"{name} runs on no image up to {_SIZES[-1]}")


def _ways(name: str) -> tuple[dict[str, Any], ...]:
    if name.startswith("test_"):  # made small by timm
        return ({},)
    return (_BY_HAND[name],) if name in _BY_HAND else _SMALLER


def _made(name: str, kwargs: dict[str, Any]) -> nn.Module | None:
    try:
        return timm.create_model(name, **kwargs)
    except Exception:
        return None


def _runs(model: nn.Module, size: int) -> bool:
    """Whether a model takes an image of this size in either mode, and more than one of its values is spread."""
    gc.collect()
    image = torch.randn(2, 3, size, size)
    try:
        with torch.no_grad():
            return all(bool(torch.isfinite(model.train(mode)(image)).all()) for mode in (True, False))
    except Exception:
        return False


def main() -> None:
    """Write the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in smallest():
        rows.append("\t".join(map(str, row(name))))
        print(rows[-1], flush=True)
    TABLE.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
