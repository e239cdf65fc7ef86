"""The regularizer of the HRA paper, which makes the vectors of each adapter more orthogonal to each other.

Source: HRA, https://arxiv.org/abs/2405.17484: the penalty `|I - U^T U|_F` on unit vectors, summed over the adapted
layers as in the authors' code. `Q` is also orthogonal without it. The penalty makes the reflections act in different
directions; it is a soft version of Gram-Schmidt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.functional import householder
from hra_fx.functional.chain import GRAM_SCHMIDT, vectors_of
from hra_fx.layers.sharding import full_tensor
from hra_fx.model.state import require_adapted_layers
from hra_fx.model.whole import check_whole


def orthogonality_loss(model: nn.Module) -> Tensor:
    """Compute the sum of `|U_n^T U_n - I|_F` over adapted layers and active adapters; add it to the training loss.

    `U_n` are the trained vectors `U: (d, r)` of an adapter, normalized. Adapters with Gram-Schmidt contribute zero, and
    so do adapters at a scale other than 1, which are not trained. For two equal vectors, the penalty is largest and its
    gradient is zero. Vectors sharded by `fully_shard` are gathered, so every process must call this function.

    Args:
        model: a transformed model, unwrapped, wrapped (DDP, `torch.compile`) or sharded (FSDP2).

    Returns:
        A scalar, at least float32 (also under autocast), on the device of the first vectors; zero if no adapter is
        active.

    Raises:
        AdapterError: the model has no adapters, or vectors cannot be loaded (see docs/large-models.md).

    Example:
        >>> from hra_fx.config import HRAConfig
        >>> from hra_fx.api.transform import transform
        >>> model = transform(nn.Sequential(nn.Linear(2, 3)), HRAConfig(r=2, target_modules=["0"], pairs=False))
        >>> with torch.no_grad():
        ...     _ = model[0].hra_u["default"].copy_(torch.tensor([[1.0, 3.0], [0.0, 4.0]]))
        >>> print(f"{orthogonality_loss(model):.4f}")  # the cosine 0.6 appears twice in the Gram matrix
        0.8485
    """
    layers = require_adapted_layers(model)
    # FSDP2 may keep gathered parameters after a forward and free them before the backward of a separate term.
    check_whole(model, "compute a loss of its vectors")
    active = [
        (adapters, name)
        for adapters in (layer.hra_u for layer in layers.values())
        for name in adapters.active
        if name not in adapters.scales
    ]
    device = active[0][0][active[0][1]].device if active else next(iter(layers.values())).hra_base.device
    total = torch.zeros((), device=device)
    for adapters, name in active:
        form = adapters.form(name)
        if not form & GRAM_SCHMIDT:
            vectors = vectors_of(form, full_tensor(adapters[name]), adapters.kept(name))
            total = total + _penalty(vectors).to(device)
    return total


def _penalty(vectors: Tensor) -> Tensor:
    """`|U_n^T U_n - I|_F` of `U: (d, r)`, or its sum over the experts of `U: (experts, d, r)`; shape `()`."""
    with householder.without_autocast(vectors):
        wide = vectors.to(householder.working_dtype(vectors.dtype))
        unit = F.normalize(wide, dim=-2)
        identity = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
        norm: Tensor = torch.linalg.matrix_norm(unit.mT @ unit - identity).sum()
    return norm
