"""The pictures in docs/: the page of the demo's model, and one block of it.

    PYTHONPATH=examples python benchmarks/pictures.py

It trains as `make demo` does, on fewer texts (two minutes on two cores), and keeps the adapter in build/pictures; the
next run loads it from there.
"""

from __future__ import annotations

from pathlib import Path

import finetune_and_fold as demo
import torch

import hra_fx

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "encoder.encoder.layer.0.attention"
ADAPTER, TEXTS = ROOT / "build" / "pictures", 960


def trained() -> tuple[demo.Classifier, dict[str, torch.Tensor]]:
    """The demo's model after training on some texts, and a batch of its inputs."""
    torch.manual_seed(0)
    texts, held_out, classes = demo.load(TEXTS, 1500, None)
    model = demo.Classifier(classes, None).eval()
    if ADAPTER.exists():
        hra_fx.load_adapter(model, ADAPTER)
    else:
        model = hra_fx.transform(model, demo.CONFIG)
        demo.train(model, "HRA", demo.LR_REFLECTIONS, texts, demo.epochs_of(TEXTS, 1, demo.BATCH))
        ADAPTER.parent.mkdir(parents=True, exist_ok=True)
        hra_fx.save_adapter(model, ADAPTER)
    return model, held_out.batch([0, 1, 2])


def main() -> None:
    """Write all pictures."""
    model, batch = trained()
    hra_fx.visualize(model, ROOT / "docs" / "adapters.html", example_inputs=batch)
    hra_fx.visualize(model, ROOT / "docs" / "hero.svg", example_inputs=batch, focus=BLOCK)


if __name__ == "__main__":
    main()
