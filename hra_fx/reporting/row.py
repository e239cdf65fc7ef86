"""One line of a report, and what is said of where a layer runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

RegionKind = Literal["whole", "shared", "alone"]


class Place(NamedTuple):
    """Where a layer runs, as the fields of a row tell."""

    region: RegionKind
    region_path: str
    region_sites: int
    region_reason: str


@dataclass(frozen=True)
class Row:
    """One adapter at one layer.

    What cannot be computed, of vectors without data or not finite, is NaN.

    Attributes:
        path: the layer.
        region: `"whole"` (the model was captured whole), `"shared"` (a part of it was) or `"alone"` (the layer).
        region_path: the root of the region.
        region_sites: number of sites in the region.
        region_reason: why the region is not larger; empty for a whole model.
        site: kind and shape of the layer.
        on_weight: whether its weight is reflected where it is read, and not its input.
        adapter: name of the adapter.
        active: whether it is one of the model's active adapters; while all are disabled too.
        d: length of its vectors.
        r: number of its trained vectors.
        parameters: `d * r`.
        rotation: `|Q - I|_F`.
        angle: largest angle by which `Q` turns a plane, in radians; pi where it reflects, 0 where nothing turns.
        mean_angle: the mean of `angles`, in radians; 0 where nothing turns.
        angles: the angle of each plane that `Q` turns, in radians from 0 to pi, falling. A plane has one; so has a
            direction that is reflected, pi. See `hra_fx.functional.statistics.rotation_stats`.
        orthogonality: `|Q^T Q - I|_F` of `Q` in the precision in which the forward computes it.
        share: which share of the layer's weight lies in the directions that `Q` turns, `|W P|_F^2 / |W|_F^2` with `P`
            the projector on them; of a quantised weight as it is dequantised. NaN for a weight that cannot be read
            (without data, sharded, or of a library that cannot dequantise it here).
    """

    path: str
    region: RegionKind
    region_path: str
    region_sites: int
    region_reason: str
    site: str
    on_weight: bool
    adapter: str
    active: bool
    d: int
    r: int
    parameters: int
    rotation: float
    angle: float
    mean_angle: float
    angles: tuple[float, ...]
    orthogonality: float
    share: float
