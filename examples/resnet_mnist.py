"""Adapt a ResNet from five digits to the other five with Householder reflections, fold them, and export the result.

    python examples/resnet_mnist.py

A torchvision ResNet-18 learns the MNIST digits 0 to 4 from random weights. Then a new classification layer is trained
with 500 images of 5 to 9: alone on the frozen network (the baseline), or together with reflections in every convolution
and the hidden layer.

The model stays in eval mode, so BatchNorm keeps the statistics of 0 to 4: these buffers belong to the base model and
must not change by folding. The two runs differ only in the reflections.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import _quiet  # noqa: F401
import torch
import torchvision
from _data import mnist
from _shared import (
    Groups,
    accuracy,
    check_classes,
    check_fold,
    check_onnx,
    epochs_of,
    export_onnx,
    fit,
    introduce,
    onnx_model,
    reflections,
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

BATCH = 32
PRETRAIN_EPOCHS = 3
LR_PRETRAIN = 2e-3
ADAPT_IMAGES = 500
ADAPT_EPOCHS = 8
LR_HEAD = 3e-2  # about the best of 3e-3, 1e-2 and 3e-2 for the baseline
LR_REFLECTIONS = 2e-2
CONFIG = hra_fx.HRAConfig(r=8, target_modules=["conv1", "conv2", "downsample.0", "fc.0"], modules_to_save=["fc.2"])


def resnet() -> torchvision.models.ResNet:
    """A ResNet-18 with a hidden layer `fc.0` before its classification layer `fc.2`."""
    model = torchvision.models.resnet18()
    model.fc = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 5))
    return model


@dataclass(frozen=True)
class Digits:
    """Images, float32 `(n, 3, 28, 28)`, and their classes 0..4, int64 `(n,)`."""

    images: Tensor
    labels: Tensor

    def split(self, size: int) -> tuple[Digits, Digits]:
        """The first `size`, and the rest."""
        return Digits(self.images[:size], self.labels[:size]), Digits(self.images[size:], self.labels[size:])


def load(seed: int = 0) -> tuple[Digits, Digits]:
    """The 2500 digits 0 to 4 and the 2500 digits 5 to 9, each in random order."""
    images, labels = mnist()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # normalize with the mean and standard deviation of MNIST
    images, labels = (images[order].expand(-1, 3, -1, -1) - 0.1307) / 0.3081, labels[order]
    low = labels < 5
    return Digits(images[low], labels[low]), Digits(images[~low], labels[~low] - 5)


@torch.no_grad()
def apply(model: nn.Module, images: Tensor, label: str) -> Tensor:
    """The model's outputs for all images."""
    return torch.cat([model(part) for part in track(images.split(128), label)])


def pretrain(model: nn.Module, digits: Digits) -> None:
    """Train the whole model from random weights, with BatchNorm, and leave it in eval mode."""
    model.train()
    batches = epochs_of(len(digits.labels), PRETRAIN_EPOCHS, BATCH)
    train(model, digits, [(model.parameters(), LR_PRETRAIN)], batches, "pretrain on 0-4")
    model.eval()


def train(model: nn.Module, digits: Digits, groups: Groups, batches: list[list[int]], label: str) -> None:
    """Train the parameters in `groups`, in the current mode of the model."""

    def loss(batch: list[int]) -> Tensor:
        return cross_entropy(model(digits.images[batch]), digits.labels[batch])

    fit(loss, groups, batches, label)


def run_baseline(model: nn.Module, digits: Digits, unseen: Tensor, batches: list[list[int]]) -> Tensor:
    """Train only `fc.2`, return its logits for `unseen`, and restore it.

    The features of the frozen layers do not change, so they are computed once.
    """
    head, model.fc[2] = model.fc[2], nn.Identity()
    features = Digits(apply(model, digits.images, "features"), digits.labels)
    unseen_features = apply(model, unseen, "features, held out")
    model.fc[2] = head
    start = copy.deepcopy(head.state_dict())
    train(head, features, [(head.parameters(), LR_HEAD)], batches, "train head only")
    with torch.no_grad():
        logits: Tensor = head(unseen_features)
    head.load_state_dict(start)
    return logits


def export_and_check(model: nn.Module, images: Tensor, file: Path) -> str:
    """Export with a dynamic batch, and check ONNX Runtime with another batch size."""
    export_onnx(model, {"x": images[:2]}, {"x": {0: torch.export.Dim.DYNAMIC}}, file)
    return check_onnx(onnx_model(file), model, {"x": images[:7]}, "batch 7")


def main(output: Path) -> None:
    """Run the demo, and write the results to `output`."""
    began = time.perf_counter()
    torch.manual_seed(0)
    introduce(
        "A ResNet-18 that was trained on the digits 0 to 4 learns 5 to 9",
        "The images come from a PyPI wheel; the ResNet is trained here first.",
    )
    first, second = load()
    known, known_unseen = first.split(2000)
    few, unseen = second.split(ADAPT_IMAGES)
    model = resnet()
    pretrain(model, known)
    before = accuracy(apply(model, known_unseen.images, "evaluate 0-4"), known_unseen.labels)

    model.fc[2] = nn.Linear(128, 5)  # a new classification layer for 5 to 9
    keys = list(model.state_dict())
    size = sum(parameter.numel() for parameter in model.parameters())
    batches = epochs_of(ADAPT_IMAGES, ADAPT_EPOCHS, BATCH)
    head_only = run_baseline(model, few, unseen.images, batches)
    model = hra_fx.transform(model, CONFIG)
    trained = trainable(model)
    groups = [(reflections(model), LR_REFLECTIONS), (model.fc[2].parameters(), LR_HEAD)]
    train(model, few, groups, batches, "train HRA and head")
    adapted = apply(model, unseen.images, "evaluate HRA")
    write_adapters(model, {"x": unseen.images[:2]}, output)

    model = hra_fx.fold(model)
    folded = apply(model, unseen.images, "evaluate folded")
    check_classes(folded, adapted)
    checks = [
        check_fold(folded, adapted, model, keys),
        "Folded: the same predictions for all held-out images",
        export_and_check(model, unseen.images, output / "resnet.onnx"),
    ]
    in_head = sum(parameter.numel() for parameter in model.fc[2].parameters())
    images = f"{ADAPT_IMAGES} images of 5 to 9, {len(unseen.labels)} held out"
    show(
        f"ResNet-18 ({size:,} parameters, {before:.1%} on 0 to 4): {images}",
        ("trained", "accuracy", "below the head", "in the head"),
        [
            ("head only", f"{accuracy(head_only, unseen.labels):.1%}", "0", f"{in_head:,}"),
            ("HRA, r = 8", f"{accuracy(adapted, unseen.labels):.1%}", f"{trained - in_head:,}", f"{in_head:,}"),
        ],
    )
    show_checks(checks)
    files = {"resnet.onnx": "the folded model, for ONNX Runtime"}
    show_files(output, files, time.perf_counter() - began)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/vision"), help="folder to write to")
    main(parser.parse_args().output)
