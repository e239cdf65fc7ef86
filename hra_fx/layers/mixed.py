"""The mixed batch of a thread: which row uses which adapter (`hra_fx.mixed_batch`)."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hra_fx.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn

#: The name that means the base model, as in PEFT.
BASE_ROW = "__base__"


@dataclass(frozen=True, eq=False)
class MixedBatch:
    """A batch in which rows use different adapters.

    Attributes:
        names: the adapters, each once; may include `BASE_ROW`.
        size: the number of rows.
        places: for each row, the position of its adapter in `names`; `None` if row `i` has adapter `i`.
        containers: the containers of all adapted layers of the model.
        state: state of the model; its adapters may be disabled.
    """

    names: tuple[str, ...]
    size: int
    places: Tensor | None
    containers: frozenset[nn.Module]
    state: Any


class _Current(threading.local):
    """The mixed batch of this thread."""

    def __init__(self) -> None:
        self.batch: MixedBatch | None = None
        self.copies = 1  # how often generation repeats each row, for beams and returned sequences


CURRENT = _Current()


def mixed_batch_of(adapters: nn.Module) -> MixedBatch | None:
    """The mixed batch that the layer of a container computes; `None` if its active adapters act on all rows."""
    batch = CURRENT.batch
    if batch is None or batch.state.disabled or not (adapters in batch.containers or _is_new(adapters, batch)):
        return None
    if adapters.training:
        raise AdapterError("the model was set to training mode inside a mixed batch. Call model.eval() first.")
    if batch.state.merged:
        raise AdapterError(
            f"adapters {list(batch.state.merged)} were merged inside a mixed batch. Call unmerge_adapter first."
        )
    if gone := [name for name in batch.names if name not in batch.state.configs and name != BASE_ROW]:
        raise AdapterError(f"adapters {gone} were deleted or folded inside a mixed batch. Start a new block.")
    return batch


def _is_new(adapters: nn.Module, batch: MixedBatch) -> bool:
    """Whether the layer of a container got its first adapter after the batch was started."""
    return any(adapters in layer._modules.values() for layer in batch.state.layers)


def check_rows(adapters: Any, x: Tensor, *, dims: int) -> None:
    """Raise an error if the first of at least `dims` dimensions of a layer's input is not the mixed batch."""
    batch, copies = CURRENT.batch, CURRENT.copies
    assert batch is not None
    if x.dim() >= dims and x.shape[0] in (batch.size, batch.size * copies):
        return
    expanded = f", or {batch.size * copies} in generation" if copies > 1 else ""
    raise AdapterError(
        f"{adapters.layer_path}: adapter_names has {batch.size} names, so the first dimension of the layer's input "
        f"must be {batch.size}{expanded}, got an input of shape {tuple(x.shape)}. Pass one name per row of the batch. "
        "Layers with inputs other than the rows of the batch, such as experts, do not support mixed batches."
    )
