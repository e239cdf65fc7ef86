"""`mixed_batch`: run a batch with a different adapter for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.batching import batch_of_rows
from hra_fx.layers.mixed import BASE_ROW, CURRENT, MixedBatch
from hra_fx.layers.sharding import first_split
from hra_fx.layers.trained_copies import BASE, all_copies
from hra_fx.model.state import AdapterState, adapted_layers, get_state, names_in, root_of


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Context manager in which each row of the batch uses its own adapter, independent of the active adapters.

    `model(..., adapter_names=...)` and `model.generate(..., adapter_names=...)` do the same for one call, as in PEFT's
    LoRA. Each adapted layer runs two batched products for all rows, for any number of adapters. The adapters may differ
    in layers, rank, scale and Gram-Schmidt. In `generate`, a row's adapter also applies to its beams and returned
    sequences. Other threads are not affected.

    Args:
        model: a transformed model, in eval mode.
        adapter_names: one name per row of the batch; `"__base__"` is the base model. The batch must be the first
            dimension of the input of every adapted layer.

    Raises:
        AdapterError: `adapter_names` is not a list of names; the model has no such adapter; the model is in training
            mode, sharded, or a captured graph; a mixed batch of another model is open; adapters are merged; the rows
            would need different trained copies (`modules_to_save` or `bias`); or an adapter is on a layer
            that is adapted through its weight. The forward raises it if the number of rows in the input of a layer
            differs from the number of names.

    Example:
        >>> from hra_fx import HRAConfig, add_adapter, transform
        >>> config = HRAConfig(r=2, target_modules=["0"], init_weights=False)
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), config, "en").eval()
        >>> add_adapter(model, "fr", config)
        >>> with mixed_batch(model, ["en", "fr", "__base__", "en"]):
        ...     model(torch.ones(4, 6)).shape
        torch.Size([4, 4])
    """
    batch = _checked(model, adapter_names)
    if CURRENT.batch is not None and CURRENT.batch.state is not batch.state:
        raise AdapterError("a mixed batch of another model is open. Close that block first.")
    with batch_of_rows(batch):
        yield


@contextmanager
def copied_rows(model: Any, options: dict[str, Any]) -> Iterator[None]:
    """Context manager for `generate` in a mixed batch, which repeats each row for its beams and returned sequences."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    # `generate` repeats each row max(num_beams, num_return_sequences) times.
    given = [options.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
    outer, CURRENT.copies = CURRENT.copies, max(number or 1 for number in given)
    try:
        yield
    finally:
        CURRENT.copies = outer


def _checked(model: nn.Module, adapter_names: Sequence[str]) -> MixedBatch:
    """Check the names and return their batch; raises the errors of `mixed_batch`."""
    own = get_state(model) if isinstance(model, nn.Module) else None
    # TorchDynamo cannot trace the search for the root; in a compiled forward, the model is the root itself.
    root, state = root_of(model) if own is None else (model, own)
    is_list = isinstance(adapter_names, Sequence) and not isinstance(adapter_names, str) and bool(adapter_names)
    if not is_list or not all(isinstance(name, str) for name in adapter_names):
        raise AdapterError(f"adapter_names must be a list with one name per row of the batch, got {adapter_names!r}.")
    rows = tuple(adapter_names)
    used = dict.fromkeys(rows)
    names_in(state, [name for name in used if name != BASE_ROW])
    _check_model(root, state)
    _check_copies(root, tuple(used))
    layers = adapted_layers(root)
    for path, layer in layers.items():
        here = [name for name in used if name in layer.hra_u.specs]
        if here and not layer.hra_u.reflects_input:
            raise AdapterError(
                f"{path} ({type(layer).__name__}): adapters {here} change the weight of this layer, but the rows of a "
                "mixed batch would need different weights. Run the rows of each adapter in a separate batch."
            )
    containers = frozenset([layer.hra_u for layer in layers.values()])
    # If names repeat, use the order of the model, so that a compiled graph is valid for a set of adapters.
    names = rows if len(used) == len(rows) else tuple(name for name in (*state.configs, BASE_ROW) if name in used)
    places = None if len(used) == len(rows) else torch.tensor([names.index(name) for name in rows])
    return MixedBatch(names, len(rows), places, containers, state)


def _check_model(root: nn.Module, state: AdapterState) -> None:
    if root.training:
        raise AdapterError(
            "A mixed batch is for inference, but the model is in training mode. Call model.eval() first."
        )
    if state.merged:
        raise AdapterError(f"adapters {list(state.merged)} are merged into the weights. Call unmerge_adapter first.")
    if sharded := first_split(root):
        raise AdapterError(
            f"{sharded[0]}: {sharded[1]} has sharded its parameters. A mixed batch needs an unsharded model."
        )


def _check_copies(root: nn.Module, names: Sequence[str]) -> None:
    """Check that no row needs a trained copy other than the one in use."""
    for path, (_, copies) in all_copies(root).items():
        for entry, present in copies.in_place.items():
            for name in names:
                if (name if entry in copies.copied.get(name, ()) else BASE) != present:
                    owner = "the base model" if present == BASE else f"adapter {present!r}"
                    raise AdapterError(
                        f"{path}.{entry}".lstrip(".")
                        + f": the copy in use is that of {owner}, but rows of {name!r} need another copy "
                        "(modules_to_save or bias). All rows of a batch share one copy: run these rows in a "
                        "separate batch."
                    )
