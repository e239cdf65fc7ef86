"""Which layers of a model a configuration means: PEFT 0.21's set, and errors that say what was probably meant.

Source of the rules: `check_target_module_exists`, `_maybe_include_all_linear_layers` and `inject_adapter` of
`peft.tuners.tuners_utils`. Their oddities are kept, because a saved adapter must meet the same layers again.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from hra_fx.config import HRAConfig, layer_index_regex, saved_module_regex
from hra_fx.errors import HRAWarning, SelectionError
from hra_fx.layers.target import REFLECTION, SAVED, find_kind
from hra_fx.selection.target_mapping import DEFAULT_TARGETS

__all__ = [
    "is_target",
    "layer_index",
    "resolve_targets",
    "saved_modules",
    "select",
    "shown_names",
    "targeted",
    "with_head",
    "without_absent",
]

_ADAPTER = {REFLECTION, SAVED}
_HEADS = ("score", "classifier")
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# From so many entries on PEFT shortens target_modules, which shows where layer indices are given too.
_MANY = 20
_SHOWN = 8
_KINDS = "nn.Linear, nn.Conv1d to Conv3d, nn.MultiheadAttention and transformers' Conv1D"


def select(model: nn.Module, config: HRAConfig) -> dict[str, nn.Module]:
    """The layers of `model` that `config` names: path -> one that may be a site, in `named_modules` order.

    A layer that is reachable on several paths is listed once, under its first. Neither argument is changed.

    Raises:
        SelectionError: no layer is named (with near misses, and with what left them out), a named module is of another
            kind, there are no default targets for this architecture, an entry of `modules_to_save`
            names nothing, or a layer would be both adapted and saved in full.

    Warns:
        HRAWarning: `exclude_modules` is given and leaves nothing out.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> select(model, HRAConfig(target_modules="all-linear", exclude_modules=["2"]))
    {'0': Linear(in_features=2, out_features=2, bias=True)}
    """
    chosen = targeted(model, config)
    modules = dict(_walk(model))
    if not chosen:
        raise SelectionError(_nothing_chosen(model, config, resolve_targets(model, config)))
    for path, module in chosen.items():
        if not _adaptable(module):
            raise SelectionError(_wrong_type(path, module))
    _check_saved(model, config, chosen)
    if config.exclude_modules and not any(_is_named(config.exclude_modules, path) for path in modules):
        near = _near_misses(config.exclude_modules, list(modules))
        text = f"exclude_modules: {shown_names(config.exclude_modules)} leaves no module out{near}"
        warnings.warn(text, HRAWarning, stacklevel=2)
    return chosen


def targeted(model: nn.Module, config: HRAConfig) -> dict[str, nn.Module]:
    """The modules that `config` names, whatever they are: path -> module, in `named_modules` order.

    >>> list(targeted(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), HRAConfig(target_modules=["1"])))
    ['1']
    """
    targets = resolve_targets(model, config)
    return {path: module for path, module in _walk(model) if is_target(config, path, targets)}


def is_target(config: HRAConfig, path: str, targets: Collection[str] | str | None = None) -> bool:
    """Whether the module at `path` is one that `config` names; looks at names only.

    Args:
        config: the configuration, for what is left out and for the layer indices.
        path: a path as in `model.named_modules()`.
        targets: what `resolve_targets` gives, where "all-linear" or the default of an architecture is to count.
            None means `config.target_modules` as it stands; where that is None too, nothing is a target.

    >>> config = HRAConfig(target_modules=["query"], layers_to_transform=1)
    >>> [is_target(config, f"encoder.layer.{i}.query") for i in range(3)]
    [False, True, False]
    """
    named = config.target_modules if targets is None else targets
    if not path or named is None or _left_out_by(config, path) or not _is_named(named, path):
        return False
    if isinstance(named, str) or path in named or not _uses_indices(config):
        return True
    index = layer_index(config, path)
    wanted = config.layers_to_transform
    return index in wanted if isinstance(wanted, Collection) else index == wanted


def resolve_targets(model: nn.Module, config: HRAConfig) -> set[str] | str:
    """`config.target_modules` with "all-linear" and None replaced by what they stand for in `model`.

    Raises:
        SelectionError: `target_modules` is None and there is no default for `model.config.model_type`.

    >>> resolve_targets(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), HRAConfig(target_modules="all-linear"))
    {'0'}
    """
    targets = config.target_modules
    if targets is None:
        targets = _default_targets(model)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model, config)
    if isinstance(targets, str):
        return targets
    if _uses_indices(config) and len(targets) >= _MANY:
        return _shortened(set(targets), [path for path, _ in _walk(model)])
    return set(targets)


def saved_modules(model: nn.Module, config: HRAConfig) -> dict[str, nn.Module]:
    """The modules that `config.modules_to_save` names: path -> module, every path of a shared module by itself.

    As in PEFT a path is named where it ends with an entry, at a dot or not.

    >>> saved_modules(nn.Sequential(nn.ReLU(), nn.Tanh()), HRAConfig(modules_to_save=["1"]))
    {'1': Tanh()}
    """
    names = tuple(config.modules_to_save or ())
    return {path: module for path, module in _walk(model, remove_duplicate=False) if names and path.endswith(names)}


def with_head(model: nn.Module, config: HRAConfig) -> HRAConfig:
    """`config` with the new head of its `task_type` among `modules_to_save`, where the model has one.

    So do PEFT's models for sequence and token classification and for question answering: a head that is drawn at random
    has to be trained.

    >>> model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    >>> with_head(model, HRAConfig(task_type="SEQ_CLS", target_modules=["encoder"])).modules_to_save
    ['classifier']
    """
    heads = _TASK_HEADS.get(config.task_type or "", ())
    found = saved_modules(model, dataclasses.replace(config, modules_to_save=heads)) if heads else {}
    present = [name for name in heads if any(path.endswith(name) for path in found)]
    if not present:
        return config
    # PEFT writes every name that a head may have, so that those of others are no mistake.
    given = [name for name in config.modules_to_save or () if name in present or name not in heads]
    return dataclasses.replace(config, modules_to_save=list(dict.fromkeys([*given, *present])))


def without_absent(model: nn.Module, config: HRAConfig) -> HRAConfig:
    """`config` without the entries of `modules_to_save` that name nothing: PEFT writes every name a head may have."""
    found = saved_modules(model, config)
    names = [name for name in config.modules_to_save or () if any(path.endswith(name) for path in found)]
    return dataclasses.replace(config, modules_to_save=names or None)


# ---- the rules ----


def _walk(model: nn.Module, *, remove_duplicate: bool = True) -> Iterable[tuple[str, nn.Module]]:
    """Every module but the root and what earlier adapters put into the model."""
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        if path and _ADAPTER.isdisjoint(path.split(".")):
            yield path, module


def _suffixes(path: str) -> list[str]:
    """The dotted suffixes of a path, shortest first: "a.b.c" gives "c", "b.c", "a.b.c"."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _is_named(names: Collection[str] | str, path: str) -> bool:
    """A string must match the whole path as a regular expression; of a collection one entry must end the path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(suffix in names for suffix in _suffixes(path))


def _left_out_by(config: HRAConfig, path: str) -> str | None:
    """The field that keeps `path` from being adapted whatever the targets are, or None."""
    if not _ADAPTER.isdisjoint(path.split(".")):
        return "an earlier adapter"
    if config.exclude_modules and _is_named(config.exclude_modules, path):
        return f"exclude_modules={shown_names(config.exclude_modules)}"
    if any(re.match(saved_module_regex(name), path) for name in config.modules_to_save or ()):
        return f"modules_to_save={config.modules_to_save}"
    return None


def _uses_indices(config: HRAConfig) -> bool:
    """An empty list of indices restricts nothing; index 0 does."""
    return config.layers_to_transform is not None and config.layers_to_transform != []


def layer_index(config: HRAConfig, path: str) -> int | None:
    """The index of the block that `path` lies in, by the first of `layers_pattern` that finds one."""
    given = config.layers_pattern
    patterns: Iterable[str | None] = [None] if not given else [given] if isinstance(given, str) else given
    for pattern in patterns:
        if match := re.match(layer_index_regex(pattern), path):
            return None if match["idx"] is None else int(match["idx"])
    return None


def _shortened(targets: set[str], paths: list[str]) -> set[str]:
    """Each target cut to its shortest suffix that ends no path outside the targets, as PEFT does with long lists.

    That names the same modules, but an entry which was a whole path, and so was free of `layers_to_transform`, may
    become a suffix, which is not.
    """
    others = {suffix for path in paths if not _is_named(targets, path) for suffix in _suffixes(path)}
    short = {next(suffix for suffix in _suffixes(target) if suffix not in others) for target in targets}
    return short if len(short) < len(targets) else targets


def _all_linear(model: nn.Module, config: HRAConfig) -> set[str]:
    """The paths of all linear layers but the output layer of a transformers model."""
    kinds = tuple(filter(None, (nn.Linear, _transformers_class("pytorch_utils", "Conv1D"))))
    head = _output_layer(model, config)
    return {path for path, module in _walk(model) if isinstance(module, kinds) and module is not head}


def _output_layer(model: nn.Module, config: HRAConfig) -> object:
    """The output embedding of a transformers model, or its head where the task is SEQ_CLS; None for other models."""
    pretrained = _transformers_class("modeling_utils", "PreTrainedModel")
    if pretrained is None or not isinstance(model, pretrained):
        return None
    output: object = getattr(model, "get_output_embeddings")()  # noqa: B009  (nn.Module types it as a tensor)
    if output is None and config.task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in _HEADS)
        return next((head for head in heads if head is not None), None)
    return output


def _transformers_class(module: str, name: str) -> type | None:
    """A class of transformers if that is loaded; if it is not, no object can be of that class."""
    return getattr(sys.modules.get(f"transformers.{module}"), name, None)


def _default_targets(model: nn.Module) -> tuple[str, ...] | str:
    model_type = _model_type(model)
    if model_type in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[model_type]
    what = f"model_type {model_type!r}" if model_type else f"{type(model).__name__}, which has no config.model_type"
    names = _leaf_names(path for path, module in _walk(model) if _adaptable(module))
    layers = f"The layers of this model are called {names}" if names else "It has no layer to adapt"
    raise SelectionError(f"target_modules: there is no default for {what}. Give target_modules. {layers}.")


def _model_type(model: nn.Module) -> str:
    """`model.config.model_type` of a config that is an object, a dict or can become a dict; "" where there is none."""
    config: Any = getattr(model, "config", None)
    if not isinstance(config, Mapping) and not hasattr(config, "model_type") and hasattr(config, "to_dict"):
        config = config.to_dict()
    found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return found if isinstance(found, str) else ""


def _adaptable(module: nn.Module) -> bool:
    return find_kind(module) is not None


# ---- what is said when they fail ----


def _check_saved(model: nn.Module, config: HRAConfig, chosen: Iterable[str]) -> None:
    saved = saved_modules(model, config)
    for name in config.modules_to_save or ():
        if not any(path.endswith(name) for path in saved):
            near = _near_misses([name], [path for path, _ in _walk(model)])
            raise SelectionError(f"modules_to_save: no module is called {name!r}{near}")
    for path in chosen:
        if held := next((s for s in saved if f"{path}.".startswith(f"{s}.")), None):
            way_out = f"Add exclude_modules=[{path!r}], or write the whole name of what is to be saved."
            what = f"is to be adapted, and modules_to_save={config.modules_to_save} saves {held!r} in full"
            raise SelectionError(f"{path}: {what}. {way_out}")


def _wrong_type(path: str, module: nn.Module) -> str:
    """What to say about a named module of a kind that cannot be adapted."""
    kind = type(module).__name__
    text = f"{path}: target_modules names it, but it is a {kind}, and only {_KINDS} can be adapted. "
    if type(module).__module__.startswith("torch.ao."):
        return (
            f"{path}: target_modules names it, but it is a quantised {kind} of torch.ao, which hides its weight and "
            "gives its input no gradient. Transform, train and fold the model before its quantisation; or quantise "
            "with torchao, as by Int8DynamicActivationInt8WeightConfig."
        )
    parts = path.split(".")
    # A block number alone says nothing: "layer.0.query", not "0.query".
    stem = ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
    below = [f"{stem}.{inner}" for inner, layer in _walk(module) if _adaptable(layer)]
    if below:
        names = repr(below) if len(below) <= _SHOWN else f"[{_leaf_names(below)}]"
        return text + f"To adapt the layers inside it write target_modules={names}."
    return text + f"Name it no more, or add exclude_modules=[{path!r}]."


def _nothing_chosen(model: nn.Module, config: HRAConfig, targets: set[str] | str) -> str:
    """What to say when no module is left to adapt."""
    kind, default = type(model).__name__, config.target_modules is None
    shown = shown_names(targets if default else config.target_modules)
    shown += f", the default for {_model_type(model)!r}," * default
    if _adaptable(model):
        return f"target_modules: the model is itself a {kind}, and only layers inside it can be adapted. Wrap it."
    layers = [path for path, module in _walk(model) if _adaptable(module)]
    if not layers:
        return f"target_modules: {kind} has no layer to adapt: only {_KINDS} can be."
    if not targets:
        return f"target_modules: {shown} names nothing. The layers of {kind} are called {_leaf_names(layers)}."
    named = [path for path, _ in _walk(model) if _is_named(targets, path)]
    if not named:
        return f"target_modules: {shown} names no module of {kind}{_near_misses(targets, layers)}"
    reasons = {_left_out_by(config, path) for path in named}
    fields = sorted(reason or _left_out_by_index(config, named) for reason in reasons)
    found = f"{len(named)} module{'s' * (len(named) > 1)} such as {named[0]!r}"
    return f"target_modules: {shown} names {found}, but nothing is left after {' and '.join(fields)}."


def _left_out_by_index(config: HRAConfig, named: list[str]) -> str:
    """The index fields, and the indices that there were to choose from."""
    found = sorted({index for path in named if (index := layer_index(config, path)) is not None})
    text = f"layers_to_transform={config.layers_to_transform}"
    if config.layers_pattern:
        text += f" with layers_pattern={config.layers_pattern!r}"
    some = ", ".join(map(str, found)) if len(found) <= _SHOWN else f"{found[0]} to {found[-1]}"
    seen = f"their layer indices are {some}" if found else "no layer index is found in their paths"
    return f"{text} ({seen})"


def _near_misses(names: Collection[str] | str, paths: list[str]) -> str:
    """How to go on from names that met nothing: the end of a sentence, from the full stop on."""
    known = {suffix for path in paths for suffix in _suffixes(path)}
    if isinstance(names, str):
        if names in known:
            return f". A string must match the whole path; to match the end of it write the list [{names!r}]."
        if inside := [path for path in paths if re.search(names, path)]:
            return f". A string must match the whole path; this one matches only a part of {inside[0]!r}."
    for name in [] if isinstance(names, str) else sorted(names):
        if any(_matches(name, path) for path in paths):
            return f". In a list {name!r} is a name, not a regular expression: give the string itself."
    near: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else sorted(names)[:_SHOWN]:
        near |= dict.fromkeys(_close(name, known))
    if not near:
        return f". The names to choose from are {_leaf_names(paths)}."
    guesses = [f"[{guess!r}]" if isinstance(names, str) else repr(guess) for guess in near]
    return f"; did you mean {' or '.join(guesses[:_SHOWN])}?"


def _close(name: str, known: set[str]) -> list[str]:
    """Names of as many components that are spelled much like `name`, else such last components."""
    alike = sorted(suffix for suffix in known if suffix.count(".") == name.count("."))
    last = sorted(suffix for suffix in known if "." not in suffix)
    return difflib.get_close_matches(name, alike) or difflib.get_close_matches(name.rpartition(".")[2], last)


def _matches(regex: str, path: str) -> bool:
    try:
        return re.fullmatch(regex, path) is not None
    except re.error:
        return False


def _leaf_names(paths: Iterable[str]) -> str:
    """The different last components of paths, in order; numbers, which say little, last."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    names.sort(key=str.isdigit)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def shown_names(names: Collection[str] | str | None) -> str:
    """A field of names as it would be written, sorted and not too long."""
    if names is None or isinstance(names, str):
        return repr(names)
    entries = sorted(names)
    return repr(entries) if len(entries) <= _SHOWN else f"{entries[:_SHOWN]!r} and {len(entries) - _SHOWN} more"
