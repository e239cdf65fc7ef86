"""Which layers could carry reflections and carry none, and why: asked of the selection of layers itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hra_fx.config import HRAConfig
from hra_fx.layers.target import REFLECTION, SAVED, SiteKind, describe, find_kind
from hra_fx.model.state import Record, inventory, record_of, sites_of
from hra_fx.selection.select import is_target, layer_index, resolve_targets
from hra_fx.selection.suggestions import shown_names

#: The fields of a configuration that keep out what `target_modules` names.
_KEEP_OUT: dict[str, Any] = dict.fromkeys(
    ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
)

_SHOWN = 8


@dataclass(frozen=True)
class Missed:
    """A layer that could carry reflections, and carries none.

    Attributes:
        path: the layer.
        site: kind and shape of the layer.
        reason: why it has none, in words.
    """

    path: str
    site: str
    reason: str


def missed_in(model: nn.Module) -> tuple[Missed, ...]:
    """The layers of a model that no adapter is at, in model order; each once, however many paths it has.

    Args:
        model: a transformed model, or one that holds some; of a part of one nobody knows what was asked for, and the
            reason says so.
    """
    adapted = set(sites_of(model).values())
    roots = set(inventory(model).roots)
    questions = {path: _questions(root) for path, root in model.named_modules() if root in roots}
    found = []
    for path, layer in model.named_modules():
        kind = find_kind(layer)
        if kind and layer not in adapted and path and not {REFLECTION, SAVED} & set(path.split(".")):
            found.append(Missed(path, describe(layer), _why(path, kind, questions)))
    return tuple(found)


class Question:
    """What one adapter asked for: which layers its configuration means, and what keeps the others out."""

    def __init__(self, outline: nn.Module, config: HRAConfig) -> None:
        """Look up what "all-linear" or the defaults stand for in a model, or in its outline."""
        self.config = config
        self.targets = resolve_targets(outline, config)
        self._bare = dataclasses.replace(config, **_KEEP_OUT)
        self._only = [
            (f"exclude_modules={shown_names(config.exclude_modules)} leaves it out", self._with("exclude_modules")),
            (f"modules_to_save={config.modules_to_save} trains it in full", self._with("modules_to_save")),
            (None, self._with("layers_to_transform", "layers_pattern")),
        ]

    def _with(self, *names: str) -> HRAConfig:
        """What would be meant if of the fields that keep layers out only these were given."""
        fields: dict[str, Any] = {name: getattr(self.config, name) for name in names}
        return dataclasses.replace(self._bare, **fields)

    def reason(self, path: str, kind: SiteKind) -> str:
        """Why the adapter is not at the layer of this path."""
        if is_target(self.config, path, self.targets):
            return "it was folded, or put in its place, after the model was transformed"
        if not is_target(self._bare, path, self.targets):
            return self._why_not_named(kind)
        against = [
            text or self._why_not_index(path) for text, only in self._only if not is_target(only, path, self.targets)
        ]
        return ", and ".join(against)

    def _why_not_named(self, kind: SiteKind) -> str:
        asked = self.config.target_modules
        if isinstance(asked, str) and asked.lower() == "all-linear":
            if kind == "linear":
                return "it is the output layer, which target_modules='all-linear' leaves out"
            return "target_modules='all-linear' means linear layers only"
        if asked is None:
            return f"the default target_modules of this architecture, {shown_names(self.targets)}, do not name it"
        return f"target_modules={shown_names(asked)} does not name it"

    def _why_not_index(self, path: str) -> str:
        wanted = f"layers_to_transform={_shown_indices(self.config.layers_to_transform)}"
        if layer_index(self.config, path) is None:
            return f"no layer index is found in its path, and {wanted} asks for some"
        return f"its layer index is not among {wanted}"


def reason_of(questions: Mapping[str, Question], path: str, kind: SiteKind) -> str:
    """Why no adapter is at a layer: the reason that all have in common, or that of each.

    Args:
        questions: adapter name -> what it asked for.
        path: the layer's path, as the adapters' configurations mean it.
        kind: the kind of layer.
    """
    reasons = {name: question.reason(path, kind) for name, question in questions.items()}
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{reason} (adapter {name})" for name, reason in reasons.items())


def _shown_indices(indices: Collection[int] | int | None) -> str:
    """Indices as they were given, or the ends of a long list."""
    if indices is None or isinstance(indices, int) or len(indices) <= _SHOWN:
        return repr(indices)
    return f"[{min(indices)}, ..., {max(indices)}] ({len(indices)} of them)"


def _questions(root: nn.Module) -> dict[str, Question]:
    record = record_of(root)
    assert isinstance(record, Record)  # that is what makes it a root
    return {name: Question(root, config) for name, config in record.configs.items()}


def _why(path: str, kind: SiteKind, questions: Mapping[str, Mapping[str, Question]]) -> str:
    if not questions:
        return "nobody knows: this is a part of the model that was transformed"
    root = _holder(path, questions)
    if root is None:
        return f"it is outside of the model that was transformed, {' and '.join(map(repr, questions))}"
    return reason_of(questions[root], path[len(root) :].lstrip("."), kind)


def _holder(path: str, roots: Iterable[str]) -> str | None:
    """The root that a path lies below."""
    return next((root for root in roots if not root or path.startswith(f"{root}.")), None)
