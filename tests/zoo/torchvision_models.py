"""Every torchvision classifier, detector and segmenter, with few blocks of full width.

A builder's own numbers are kept but for depth, and for the width of those that are too large for two cores: they are
changed on the way from the builder to the helper that it calls (`_resnet`, `_vision_transformer` ...).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import detection, segmentation
from zoo.entry import Call, Entry

_CLASSES = 5


def _resnet(block: Any, layers: list[int], *rest: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (block, layers if sum(layers) <= 8 else [1, 2, 1, 1], *rest), kwargs


def _regnet(params: Any, *rest: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params.group_widths = [min(width, 16) for width in params.group_widths]
    params.widths = [width * (2 + i) for i, width in enumerate(params.group_widths)]
    params.depths = [min(depth, 2) for depth in params.depths]
    return (params, *rest), kwargs


def _few_blocks(settings: Any, *rest: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of ConvNeXt, also narrow ones."""
    for setting in settings:
        setting.num_layers = min(setting.num_layers, 2)
        if hasattr(setting, "input_channels") and not hasattr(setting, "kernel"):
            setting.input_channels //= 2
            setting.out_channels = setting.out_channels and setting.out_channels // 2
    return (settings, *rest), kwargs


#: (file below torchvision.models, helper that builders call) -> its arguments, made smaller.
_SMALLER: dict[tuple[str, str], Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]] = {
    ("resnet", "_resnet"): _resnet,
    ("vision_transformer", "_vision_transformer"): lambda **kwargs: (
        (),
        kwargs | {"num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 96},
    ),
    ("swin_transformer", "_swin_transformer"): lambda **kwargs: (
        (),
        kwargs | {"depths": [2, 2, 2, 2], "embed_dim": kwargs["embed_dim"] // 3, "num_heads": [1, 2, 4, 8]},
    ),
    ("regnet", "_regnet"): _regnet,
    ("convnext", "_convnext"): _few_blocks,
    ("efficientnet", "_efficientnet"): _few_blocks,
    ("maxvit", "_maxvit"): lambda **kwargs: ((), kwargs | {"partition_size": 2, "block_layers": [1, 1, 2, 1]}),
}


@contextmanager
def _smaller() -> Iterator[None]:
    """Builders make smaller models meanwhile."""

    def changed(helper: Callable[..., nn.Module], change: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
        args, kwargs = change(*args, **kwargs)
        return helper(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for (file, name), change in _SMALLER.items():
            module = importlib.import_module(f"torchvision.models.{file}")
            patch.setattr(module, name, partial(changed, getattr(module, name), change))
        yield


_FEW = {
    **{"min_size": 64, "max_size": 128, "trainable_backbone_layers": 5},
    **dict.fromkeys(("rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test"), 40),
    **dict.fromkeys(("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"), 12),
    **{"box_batch_size_per_image": 8, "box_detections_per_img": 4},
}
_ANCHORS = {"trainable_backbone_layers": 5, "topk_candidates": 20, "detections_per_img": 4}
#: Beginning of a model's name -> arguments of its builder. In both tables, the longest beginning counts.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "": {},
    **{name: {"init_weights": False} for name in ("inception_v3", "googlenet", "vgg")},
    "vit_": {"image_size": 64},
    "vit_h_14": {"image_size": 56},
    "maxvit_t": {"input_size": (64, 64)},
    **dict.fromkeys(("fasterrcnn", "maskrcnn", "keypointrcnn"), _FEW),
    "fasterrcnn_mobilenet": _FEW | {"trainable_backbone_layers": 6},
    **{name: {"min_size": 64, "max_size": 128, **_ANCHORS} for name in ("fcos", "retinanet")},
    "ssd300": _ANCHORS,
    "ssdlite": _ANCHORS | {"trainable_backbone_layers": 6},
    **{name: {"aux_loss": True} for name in ("deeplabv3", "fcn")},
}
#: Beginning of a model's name -> the sides of its images.
_SIDES = {"": (64, 96), "inception_v3": (299,), "vit_": (64,), "vit_h_14": (56,), "maxvit_t": (64,)}
#: Models that take seconds for a call, and half as many in float32.
_SLOW = ("ssd300_vgg16", "keypointrcnn_resnet50_fpn")


def _longest(name: str, table: dict[str, Any]) -> Any:
    return table[max((beginning for beginning in table if name.startswith(beginning)), key=len)]


def images(sizes: tuple[int, ...]) -> Callable[[int, int], Call]:
    return lambda batch, size: ((torch.randn(batch, 3, sizes[size], sizes[size]),), {})


def _narrow(classifier: Any) -> None:
    """Three Linears of which the first has up to 100 million weights."""
    places = [place for place, layer in enumerate(classifier) if isinstance(layer, nn.Linear)]
    widths = [classifier[places[0]].in_features, 64, 64, _CLASSES]
    for i, place in enumerate(places):
        classifier[place] = nn.Linear(widths[i], widths[i + 1])


def _with_targets(batch: int, size: int, *, labels: tuple[int, int]) -> Call:
    """Images and what is seen on them, as detectors take them."""
    side = (64, 96)[size]
    corners = torch.rand(batch, 2, 2) * side / 3
    boxes = torch.cat([corners, corners + side / 3 + torch.rand(batch, 2, 2) * side / 4], dim=2)
    targets = [
        {
            "boxes": each,
            "labels": torch.tensor(labels),
            "masks": torch.randint(0, 2, (2, side, side), dtype=torch.uint8),
            "keypoints": torch.cat([each[:, None, :2] + torch.rand(2, 17, 2) * side / 4, torch.ones(2, 17, 1)], dim=2),
        }
        for each in boxes
    ]
    return (list(torch.rand(batch, 3, side, side)), targets), {}


def _entry(name: str, kind: Any) -> Entry:
    """A model of one of torchvision's modules."""
    finds_people = name.startswith("keypoint")
    given = {"num_classes": 2 if finds_people else _CLASSES, **_longest(name, _ARGUMENTS)}
    sides = _longest(name, _SIDES)

    def build() -> nn.Module:
        with _smaller():
            backbone = {} if kind is models else {"weights_backbone": None}
            model: Any = models.get_model(name, weights=None, **backbone, **given)
        for part in (model, getattr(model, "roi_heads", model)):
            if hasattr(part, "score_thresh"):  # random scores are low
                part.score_thresh = 0.0
        if name.startswith(("vgg", "alexnet")):
            _narrow(model.classifier)
        return model

    calls = images(sides)
    if kind is detection:
        calls = partial(_with_targets, labels=(1, 1) if finds_people else (1, 2))
    batches = (2, 3) if kind is not detection else (1, 2) if name in _SLOW else (2, 1)
    return Entry(f"torchvision/{name}", build, calls, len(sides), batches, double=name not in _SLOW)


ENTRIES = [_entry(name, kind) for kind in (models, detection, segmentation) for name in models.list_models(kind)]
