"""The pictures in docs/: the page of the demo's model, and one block of it.

    PYTHONPATH=examples python benchmarks/pictures.py

It trains as `make demo` does, on fewer texts (two minutes on two cores), and keeps the adapter in build/pictures; the
next run loads it from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import finetune_and_fold as demo
import torch

import hra_fx

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "encoder.encoder.layer.0.attention"


def trained(folder: Path, size: int) -> tuple[demo.Classifier, dict[str, torch.Tensor]]:
    """The demo's model after training on `size` texts, and a batch of its inputs."""
    torch.manual_seed(0)
    texts, held_out, classes = demo.load(size, 1500, None)
    model = demo.Classifier(classes, None).eval()
    if folder.exists():
        hra_fx.load_adapter(model, folder)
    else:
        model = hra_fx.transform(model, demo.CONFIG)
        demo.train(model, "HRA", demo.LR_REFLECTIONS, texts, demo.epochs_of(size, 1, demo.BATCH))
        folder.parent.mkdir(parents=True, exist_ok=True)
        hra_fx.save_adapter(model, folder)
    return model, held_out.batch([0, 1, 2])


def main(docs: Path, adapter: Path, size: int) -> None:
    """Write all pictures."""
    model, batch = trained(adapter, size)
    hra_fx.visualize(model, docs / "adapters.html", example_inputs=batch)
    hra_fx.visualize(model, docs / "hero.svg", example_inputs=batch, focus=BLOCK)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write to (default docs)")
    parser.add_argument(
        "--adapter", type=Path, default=ROOT / "build" / "pictures", help="folder of the trained adapter"
    )
    parser.add_argument("--train", type=int, default=960, help="training texts (default 960)")
    arguments = parser.parse_args()
    main(arguments.docs, arguments.adapter, arguments.train)
