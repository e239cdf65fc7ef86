"""Find the embeddings of `trainable_token_indices`, add rows to them, and write trained rows into their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import state_modules
from hra_fx.config import HRAConfig
from hra_fx.errors import SelectionError, UnsupportedLayerError
from hra_fx.layers.accelerate_hooks import has_class_forward, offloading_hook
from hra_fx.layers.class_swap import original_class, swap, unswap
from hra_fx.layers.readers import writes_weight_of
from hra_fx.layers.target import ADAPTER_CHILDREN, REFLECTION, TOKENS
from hra_fx.layers.trained_copies import BASE, Copies, get_copies
from hra_fx.layers.trained_tokens import INDICES, ROWS, TokenRows, TrainedTokens, plain_forward, token_rows
from hra_fx.layers.weight import mark_readers
from hra_fx.model.tied import tied_to

_FIELD = "trainable_token_indices"
NOT_IN_GRAPHS = (
    f"{_FIELD}: a graph may read the embedding without calling it. Use eager mode (without trace=True), or train the "
    "embedding in full with modules_to_save."
)


class TokenPlace(NamedTuple):
    """An embedding with trained tokens, and the layers that are tied to it.

    Attributes:
        path: path of the child of the embedding that contains the rows.
        layers: the embedding, then the tied layers.
        indices: the tokens.
    """

    path: str
    layers: tuple[Any, ...]
    indices: list[int]

    @property
    def start(self) -> dict[str, Tensor]:
        """The rows of the base model, and their indices, by the names of their tensors."""
        indices = torch.tensor(self.indices, device=self.layers[0].weight.device)
        return {ROWS: self.layers[0].weight.detach()[indices], INDICES: indices}


def token_places(model: nn.Module, config: HRAConfig) -> list[TokenPlace]:
    """The embeddings of `config.trainable_token_indices`, which are checked. As in PEFT, names match ends of paths."""
    if not config.trainable_token_indices:
        return []
    if isinstance(model, fx.GraphModule):
        raise UnsupportedLayerError(NOT_IN_GRAPHS)
    modules = dict(state_modules(model))
    found: dict[int, TokenPlace] = {}
    for path, layer, indices in _named(model, config, modules):
        weight: Any = layer._parameters.get("weight")
        if id(weight) not in found:
            others = tied_to(model, {f"{path}.weight": weight}).get(f"{path}.weight", ()) if weight is not None else ()
            tied = {path, *(name.rpartition(".")[0] for name in others)}
            # The embedding has the rows, as in PEFT, even if its output layer is named first.
            order = [place for place in modules if place in tied]
            order.sort(key=lambda place: not isinstance(modules[place], nn.Embedding))
            _check(model, {place: modules[place] for place in order}, others, indices)
            found[id(weight)] = TokenPlace(f"{order[0]}.{TOKENS}", tuple(modules[p] for p in order), indices)
        elif found[id(weight)].indices != indices:
            raise SelectionError(f"`{_FIELD}`: {path} is tied to another entry, so both must have the same tokens.")
    return list(found.values())


def _named(
    model: Any, config: HRAConfig, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, nn.Module, list[int]]]:
    """(path, module, tokens) of every entry of the configuration."""
    given: Any = config.trainable_token_indices
    if not isinstance(given, dict):
        try:
            embedding = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            embedding = None
        path = next((path for path, module in modules.items() if module is embedding), None)
        given = {"embed_tokens" if path is None else path: given}
    for name, indices in given.items():
        paths = [path for path in modules if path.endswith(name) and ADAPTER_CHILDREN.isdisjoint(path.split("."))]
        if not paths:
            raise SelectionError(
                f"`{_FIELD}`: the model has no module {name!r}. Name the embedding: "
                f"{_FIELD}={{'path.of.embedding': [...]}}."
            )
        yield from ((path, modules[path], indices) for path in paths)


def _check(model: nn.Module, layers: dict[str, nn.Module], tied: Iterable[str], indices: list[int]) -> None:
    for path, layer in layers.items():
        reason = _why_not_trained(layer)
        if reason is None and (name := next((name for name in tied if not name.endswith(".weight")), None)):
            reason = f"it shares memory with {name}, which is not the weight of a layer"
        names, classes = {path.rpartition(".")[2]}, {original_class(part) for part in model.modules()}
        if reason is None and writes_weight_of(names, classes):
            reason = "the code of the model writes into its weight"
        if reason is not None:
            raise UnsupportedLayerError(
                f"{path} ({type(layer).__name__}): {reason}, so {_FIELD} cannot train some of its tokens. To train "
                "the embedding in full, use modules_to_save."
            )
        weight: Any = layer.weight
        if wrong := [index for index in indices if index >= len(weight)]:
            raise SelectionError(
                f"`{_FIELD}`: {path} has {len(weight)} rows, so it has no token {wrong[0]}. First call "
                "model.resize_token_embeddings(len(tokenizer))."
            )


def _why_not_trained(layer: Any) -> str | None:
    """Return why tokens of this layer cannot be trained, or `None`; without a final period."""
    weight, copies = layer._parameters.get("weight"), get_copies(layer)
    if not isinstance(layer, (nn.Embedding, nn.Linear)) or type(weight) is not nn.Parameter:
        return "it is not an nn.Embedding or nn.Linear with a weight of its own"
    if REFLECTION in layer._modules:
        return "an adapter reflects it (target_modules)"
    if copies is not None and "weight" in copies.in_place:
        return "an adapter trains it in full (modules_to_save)"
    if weight.is_meta or offloading_hook(layer) is not None:
        return "its weight is not in memory"
    if not weight.is_floating_point() or weight.is_inference():
        return "its weight cannot be written: it is quantized, or created in inference mode"
    if getattr(layer, "max_norm", None) is not None or getattr(layer, "scale_grad_by_freq", False):
        return "it has max_norm or scale_grad_by_freq, which depend on the whole weight"
    return None if has_class_forward(layer) and plain_forward(layer) else "it has a forward of its own"


def attach_tokens(
    model: nn.Module, config: HRAConfig, undo: ExitStack
) -> tuple[dict[str, tuple[nn.Module, tuple[str, ...]]], dict[tuple[str, str], Tensor]]:
    """Add empty rows to the embeddings of a configuration, if they have none.

    Returns what an adapter copies, path -> (module, names of its tensors), as `trainable.to_copy` does, and the values
    of the base model.
    """
    wanted: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    values: dict[tuple[str, str], Tensor] = {}
    for place in token_places(model, config):
        embedding, *tied = place.layers
        rows = token_rows(embedding)
        if rows is None:
            rows = TokenRows(embedding.weight).train(embedding.training)
            undo.callback(detach_tokens, model)
            embedding.add_module(TOKENS, rows)
            for layer in tied:
                vars(layer)[TOKENS] = (rows,)  # not a child: the tensors have one name
            for layer in place.layers:
                swap(layer, TrainedTokens)
            mark_readers([part for part in model.modules() if not set(place.layers).isdisjoint(part.modules())], undo)
        wanted[place.path] = rows, (ROWS, INDICES)
        values |= {(place.path, name): value for name, value in place.start.items()}
    return wanted, values


def without_rows(model: nn.Module, config: HRAConfig, adapter: str) -> list[str]:
    """The paths of embeddings of a configuration that have no rows of the adapter, because they were replaced."""
    named = _named(model, config, dict(state_modules(model))) if config.trainable_token_indices else ()
    rows: dict[str, Any] = {path: token_rows(layer) for path, layer, _ in named}
    return [path for path, own in rows.items() if own is None or adapter not in getattr(get_copies(own), "copied", ())]


def detach_tokens(model: nn.Module) -> None:
    """Make embeddings and tied layers without trained rows plain layers again."""
    for layer in model.modules():
        rows = token_rows(layer)
        if rows is not None and get_copies(rows) is None:
            layer._modules.pop(TOKENS, None)
            vars(layer).pop(TOKENS, None)
            unswap(layer, TrainedTokens)


@torch.no_grad()
def write_rows(model: nn.Module, rows: nn.Module, adapter: str) -> None:
    """Write an adapter's rows into the weight of their embedding and of layers that are tied to it."""
    copies = get_copies(rows)
    trained = copies.tensors(rows, adapter) if copies else {}
    for layer in model.modules() if trained else ():
        if token_rows(layer) is rows:
            weight: Any = layer.weight
            weight.index_copy_(0, trained[INDICES], trained[ROWS].to(weight.dtype))


def rows_of_base(model: nn.Module, owner: nn.Module, copies: Copies, adapter: str, name: str) -> Tensor:
    """The base model's value of a trained copy; for the rows of tokens, those in the weight of the embedding."""
    if not isinstance(owner, TokenRows):
        return copies.get(owner, BASE, name)
    if name == INDICES:
        return copies.get(owner, adapter, INDICES)
    embedding: Any = next(layer for layer in model.modules() if token_rows(layer) is owner)
    rows: Tensor = embedding.weight.detach()[copies.get(owner, adapter, INDICES)]
    return rows
