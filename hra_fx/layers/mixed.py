"""The mixed batch that a thread computes: which row has which adapter (`hra_fx.mixed_batch`)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from hra_fx.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn

#: The name that stands for the base model, as in PEFT.
BASE_ROW = "__base__"


@dataclass(frozen=True, eq=False)
class MixedBatch:
    """A batch whose rows have different adapters.

    Attributes:
        names: the adapters, each once, `BASE_ROW` among them.
        size: the number of rows.
        places: the place in `names` of each row; `None` if row `i` has adapter `i`.
        paths: container -> path of its layer, for all adapted layers of the model.
        state: that of the model, whose adapters may be disabled.
    """

    names: tuple[str, ...]
    size: int
    places: Tensor | None
    paths: Mapping[Any, str]
    state: Any

    def refuse_weight(self, adapters: nn.Module, names: list[str]) -> NoReturn:
        """Refuse a computation with the rotated weight, of which a mixed batch has several.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            f"{self.paths[adapters]}: adapters {names} are on this layer, but its weight is read or traced, and the "
            "rows of a mixed batch would need different weights. Run the rows of each adapter in a separate batch."
        )


class _Current(threading.local):
    """The mixed batch of this thread.

    Attributes:
        batch: the batch.
        copies: how often generation repeats each row, one after the other: for beams and returned sequences.
    """

    def __init__(self) -> None:
        self.batch: MixedBatch | None = None
        self.copies = 1


CURRENT = _Current()


def mixed_batch_of(adapters: nn.Module) -> MixedBatch | None:
    """The mixed batch that the layer of a container is computed for; `None` if its active adapters act on all rows.

    Raises:
        AdapterError: adapters were merged, deleted or folded, or the model was set to training mode, since the batch
            began.
    """
    batch = CURRENT.batch
    if batch is None or batch.state.disabled or not (adapters in batch.paths or _is_new(adapters, batch)):
        return None
    if adapters.training:
        raise AdapterError("the model was set to training mode inside a mixed batch. Call model.eval() first.")
    if batch.state.merged:
        raise AdapterError(
            f"adapters {list(batch.state.merged)} were merged inside a mixed batch. Call unmerge_adapter first."
        )
    if gone := [name for name in batch.names if name not in batch.state.configs and name != BASE_ROW]:
        raise AdapterError(f"adapters {gone} were deleted or folded inside a mixed batch. Open a new block.")
    return batch


def _is_new(adapters: nn.Module, batch: MixedBatch) -> bool:
    """Whether the layer of a container got its first adapter since the batch began."""
    return any(adapters in layer._modules.values() for layer in batch.state.layers)


def check_rows(adapters: nn.Module, x: Tensor, *, dims: int) -> None:
    """Check that the first dimension of a layer's input is the mixed batch.

    Args:
        adapters: the container of the layer.
        x: the input.
        dims: the number of dimensions that it has at least.

    Raises:
        AdapterError: it is not.
    """
    batch, copies = CURRENT.batch, CURRENT.copies
    assert batch is not None
    if x.dim() >= dims and x.shape[0] in (batch.size, batch.size * copies):
        return
    expanded = f", or {batch.size * copies} in generation" if copies > 1 else ""
    raise AdapterError(
        f"{batch.paths[adapters]}: adapter_names has {batch.size} names, so the first dimension of the layer's input "
        f"must be {batch.size}{expanded}, got an input of shape {tuple(x.shape)}. Give one name per row of the batch. "
        "Layers that get other rows than those of the batch, such as experts, do not support mixed batches."
    )
