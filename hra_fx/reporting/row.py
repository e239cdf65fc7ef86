"""One row of a report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One adapter at one layer.

    Values that cannot be computed (vectors without data, or not finite) are NaN.

    Attributes:
        path: qualified name of the layer.
        layer_type: class and shape of the layer, such as `"Linear 6->8"`.
        adapter: name of the adapter.
        active: whether the adapter is one of the model's active adapters. Disabling all adapters does not change it.
        d: length of a reflection vector.
        r: number of trainable vectors.
        parameters: `d * r`; for experts, `experts * d * r`.
        rotation: `|Q - I|_F`.
        angle: largest rotation angle of `Q` in radians. It is pi for a reflection, and 0 for the identity.
        mean_angle: mean of `angles` in radians, 0 for the identity.
        angles: rotation angle of each plane that `Q` rotates, in radians from 0 to pi, in descending order. A reflected
            direction that is left over counts as one angle of pi. Angles below the rounding error are left out.
        orthogonality: `|Q^T Q - I|_F` of `Q` in the precision of the forward pass.
        share: share of the weight that `Q` changes: `|W P|_F^2 / |W|_F^2`, with `P` the projector on the directions
            that `Q` does not leave as they are. A quantized weight is dequantized first. NaN if the weight cannot be
            read (no data, sharded, or its library cannot dequantize it here).
        weight_change: `|W Q - W|_F / |W|_F`: how much `Q` changes the weight, relative to its size. NaN as for `share`.
        bytes: memory of the vectors; 0 in a report of a graph.
        bytes_here: what this process holds of it, which is less if they are sharded.
        graph: path of the traced graph that shows the layer (`""` for the whole model), `None` if there is none or
            `report` was called without `capture=True`.
        graph_reason: why that graph is not larger, `""` for the whole model.
    """

    path: str
    layer_type: str
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
    weight_change: float
    bytes: int = 0
    bytes_here: int = 0
    graph: str | None = None
    graph_reason: str = ""
