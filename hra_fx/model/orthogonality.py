"""The paper's regulariser, which pulls the vectors of each adapter towards orthogonality.

Source: HRA, https://arxiv.org/abs/2405.17484, the penalty `|I - U^T U|_F` on vectors of length one, summed over the
adapted layers as in the authors' code. `Q` is orthogonal without it; the penalty makes the reflections act in different
directions, softly where Gram-Schmidt does so strictly.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.functional import householder
from hra_fx.layers.sharding import reshard, whole
from hra_fx.model.offload import require_materialized
from hra_fx.model.state import require_sites


def orthogonality_loss(model: nn.Module) -> Tensor:
    """The sum over sites and active adapters of `|U_n^T U_n - I|_F`, to be added to a training loss.

    `U: (d, r)` are the trained vectors of an adapter (its frozen anchor is left out), `U_n` the same at length one; the
    length is part of what is differentiated. An adapter with Gram-Schmidt reflects by an orthonormal basis and
    contributes nothing. Where two vectors are equal, as at the start of `init_weights=True`, the penalty of that pair
    is at its largest and its gradient zero: the gradient of the task has to part them first.

    Where `fully_shard` shares the vectors out, they are gathered: every process has to call this, at the same moment.

    Args:
        model: a transformed model, bare, wrapped (DDP, `torch.compile`) or sharded (FSDP2).

    Returns:
        `()`, float32 or wider, also under autocast, on the device of the first vectors; zero where nothing is active.

    Raises:
        AdapterError: the model has no reflections, or accelerate offloads them.

    Example:
        >>> from hra_fx.config import HRAConfig
        >>> from hra_fx.api.transform import transform
        >>> model = transform(nn.Sequential(nn.Linear(2, 3)), HRAConfig(r=2, target_modules=["0"]))
        >>> with torch.no_grad():
        ...     _ = model[0].hra_u["default"].copy_(torch.tensor([[1.0, 3.0], [0.0, 4.0]]))
        >>> print(f"{orthogonality_loss(model):.4f}")  # the cosine 0.6 stands twice in the Gram matrix
        0.8485
    """
    sites = require_sites(model)
    require_materialized(model)
    # What FSDP2 leaves whole after a forward is freed before the backward of a term beside the loss may come.
    reshard(model)
    active = [
        (layer.hra_u[name], layer.hra_u.specs[name].apply_GS) for layer in sites.values() for name in layer.hra_u.active
    ]
    device = active[0][0].device if active else next(iter(sites.values())).hra_base.device
    total = torch.zeros((), device=device)
    for vectors, apply_GS in active:
        if not apply_GS:
            total = total + _penalty(whole(vectors)).to(device)
    return total


def _penalty(vectors: Tensor) -> Tensor:
    """`|U_n^T U_n - I|_F` of `U: (d, r)`; `()`."""
    device = vectors.device.type
    autocasts = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if autocasts else contextlib.nullcontext():
        wide = vectors.to(householder.working_dtype(vectors.dtype))
        # Scaled by constants first, for the squares of a column may leave the range of the dtype; then by lengths that
        # are differentiated. A change of scale does not change what the second one gives, nor its derivative.
        unit = F.normalize(householder.normalize(wide), dim=0)
        identity = torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
        norm: Tensor = torch.linalg.matrix_norm(unit.mT @ unit - identity)
    return norm
