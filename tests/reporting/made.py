"""Reports with rows that tests invent, oracles for their values, and a name that contains markup."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from hra_fx.reporting.report import Report
from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import SkippedLayer

#: Contains markup of HTML, Markdown, JSON and rich.
HOSTILE = "<script>alert('&')</script>|`*[red]_x_[/red]\\\"~#"

_ROW = Row(
    path="layer",
    layer_type="Linear 8->4",
    adapter="default",
    active=True,
    d=8,
    r=2,
    parameters=16,
    rotation=0.5,
    angle=0.3,
    mean_angle=0.2,
    angles=(0.3, 0.1),
    orthogonality=1e-7,
    share=0.25,
    weight_change=0.1,
)


def row(path: str = "layer", **fields: Any) -> Row:
    return dataclasses.replace(_ROW, path=path, **fields)


def report_of(*rows: Row, skipped: tuple[SkippedLayer, ...] = ()) -> Report:
    return Report(rows, skipped)


def blocks(count: int, *names: str, stack: str = "model.layers", **fields: Any) -> list[Row]:
    """The rows of a deep model, with increasing angles."""
    angles = torch.linspace(0.01, 0.5, count * len(names)).tolist()
    paths = [f"{stack}.{index}.attn.{name}" for index in range(count) for name in names]
    return [row(path, mean_angle=angle, angle=2 * angle, **fields) for path, angle in zip(paths, angles, strict=True)]


def oracle_angles(q: Tensor, floor: float = 1e-7) -> list[float]:
    """One angle for each plane and for a reflected direction that is left over, from all eigenvalues of `Q`."""
    phases = torch.linalg.eigvals(q).angle()
    # A plane that is rotated by less than pi has one eigenvalue above the real axis.
    inner = [float(phase) for phase in phases if floor < float(phase) < math.pi - floor]
    reflected = int((phases.abs() >= math.pi - floor).sum())
    return sorted([math.pi] * math.ceil(reflected / 2) + inner, reverse=True)


def oracle_share(weight: Tensor, q: Tensor) -> float:
    """The share of `W: (out, d)` in the span of the eigenvectors of `(Q - I)^T (Q - I)` with nonzero eigenvalues."""
    moved = q - torch.eye(q.shape[0], dtype=torch.float64)
    sizes, vectors = torch.linalg.eigh(moved.mT @ moved)
    basis = vectors[:, sizes > 1e-12]
    wide = weight.detach().double()
    return float((wide @ basis @ basis.mT).square().sum() / wide.square().sum())
