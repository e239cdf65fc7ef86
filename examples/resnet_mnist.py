"""Adapt a ResNet from five digits to the other five with Householder reflections, fold them, and export the result.

    python examples/resnet_mnist.py

A torchvision ResNet-18 learns the digits 0 to 4 (real MNIST images) from random weights. A few images of 5 to 9 must then do
for a fresh classification layer: alone on the frozen network (the baseline), or with reflections in every convolution, which
turn what the network has learnt without changing its singular values.

Batch normalisation keeps the statistics of 0 to 4 throughout (the model stays in eval mode): they are the base model's
buffers, not the adapter's, and must be the same after folding; and both runs then differ in the reflections alone.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import torchvision
from _data import mnist
from _shared import (
    accuracy,
    bar,
    console,
    export_onnx,
    onnx_difference,
    require,
    show,
    shuffled,
    train_head,
    trainable,
    write_adapters,
)
from torch import Tensor, nn

import hra_fx

BATCH = 32
PRETRAIN_EPOCHS = 3
ADAPT_IMAGES = 500
ADAPT_EPOCHS = 8
LR_HEAD = 3e-3
LR_REFLECTIONS = 1e-2
CONFIG = hra_fx.HRAConfig(
    r=8, target_modules=["conv1", "conv2", "downsample.0", "fc.0"], modules_to_save=["fc.2"]
)


def resnet() -> torchvision.models.ResNet:
    """A ResNet-18 with a hidden layer, `fc.0`, below its classification layer, `fc.2`."""
    model = torchvision.models.resnet18()
    model.fc = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 5))
    return model


def load(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images `(n, 3, 28, 28)` and classes 0..4 of the digits 0 to 4, then of 5 to 9, each shuffled."""
    images, labels = mnist()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = (images[order].expand(-1, 3, -1, -1) - 0.1307) / 0.3081, labels[order]  # MNIST's mean and deviation
    low = labels < 5
    return images[low], labels[low], images[~low], labels[~low] - 5


@torch.no_grad()
def apply(model: nn.Module, images: Tensor, label: str) -> Tensor:
    """The model's outputs for all images, in eval mode."""
    return torch.cat([model(images[batch]) for batch in bar(list(torch.arange(len(images)).split(128)), label)])


def pretrain(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train all of the model from random weights, batch normalisation included; leaves it in eval mode."""
    generator = torch.Generator().manual_seed(0)
    batches = [batch for _ in range(PRETRAIN_EPOCHS) for batch in shuffled(len(images), BATCH, generator)]
    model.train()
    fit(lambda batch: cross_entropy(model(images[batch]), labels[batch]), [(model.parameters(), 2e-3)], batches, "pretrain 0-4")
    model.eval()


def run_baseline(model: nn.Module, images: Tensor, labels: Tensor, batches: list[list[int]], unseen: Tensor) -> Tensor:
    """Train `fc.2` alone; gives its logits of `unseen`, and restores it.

    The frozen layers below give the same features each time: computed once, they make this head-only training.
    """
    head, model.fc[2] = model.fc[2], nn.Identity()
    features, unseen_features = apply(model, images, "features"), apply(model, unseen, "features, held out")
    model.fc[2] = head
    start = copy.deepcopy(head.state_dict())
    groups = [(head.parameters(), LR_HEAD)]
    fit(lambda batch: cross_entropy(head(features[batch]), labels[batch]), groups, batches, "train head only")
    with torch.no_grad():
        logits: Tensor = head(unseen_features)
    head.load_state_dict(start)
    return logits


def export_and_check(model: nn.Module, images: Tensor, file: Path) -> tuple[str, str]:
    """Export with a dynamic batch; onnxruntime must agree at another batch."""
    export_onnx(model, {"x": images[:2]}, {"x": {0: torch.export.Dim.DYNAMIC}}, file)
    difference = onnx_difference(model, {"x": images[:7]}, file)
    require(difference < 1e-3, f"onnxruntime gives PyTorch's logits (largest difference {difference:.1e})")
    return "onnxruntime against PyTorch, batch 7", f"{difference:.1e}"


def main(output: Path) -> None:
    """The whole run; what it wrote lies in `output`."""
    began = time.perf_counter()
    torch.manual_seed(0)
    first, first_labels, images, labels = load()
    model = resnet()
    pretrain(model, first[:2000], first_labels[:2000])
    known = accuracy(apply(model, first[2000:], "evaluate 0-4"), first_labels[2000:])

    model.fc[2] = nn.Linear(128, 5)  # a fresh classification layer for 5 to 9
    keys = list(model.state_dict())
    images, unseen, labels, unseen_labels = *images.split([ADAPT_IMAGES, 2500 - ADAPT_IMAGES]), *labels.split([ADAPT_IMAGES, 2500 - ADAPT_IMAGES])
    generator = torch.Generator().manual_seed(0)
    batches = [batch for _ in range(ADAPT_EPOCHS) for batch in shuffled(ADAPT_IMAGES, BATCH, generator)]
    head_only = run_baseline(model, images, labels, batches, unseen)

    model = hra_fx.transform(model, CONFIG)
    groups = [(reflections(model), LR_REFLECTIONS), (model.fc[2].parameters(), LR_HEAD)]
    fit(lambda batch: cross_entropy(model(images[batch]), labels[batch]), groups, batches, "train HRA and head")
    adapted = apply(model, unseen, "evaluate HRA")
    write_adapters(model, output)
