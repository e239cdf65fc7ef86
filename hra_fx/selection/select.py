"""Select the layers that a configuration targets, with the matching rules of PEFT 0.21.

Source of the rules: `check_target_module_exists`, `_maybe_include_all_linear_layers` and `inject_adapter` in
`peft.tuners.tuners_utils`. Their edge cases are kept, because a saved adapter must select the same layers when it is
loaded.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

from torch import nn

from hra_fx.compat import state_modules, state_paths
from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning, SelectionError
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.peft_layers import is_peft_layer, refuse_peft_layers
from hra_fx.layers.target import ADAPTER_CHILDREN, find_kind
from hra_fx.selection.origin import DEFAULT_TARGETS, GraphPart, origin_of
from hra_fx.selection.parameters import parameters_hint, parameters_problem, targeted_parameters
from hra_fx.selection.suggestions import available, format_names, some_of, suffixes

#: Path -> module, without modules that adapters added. The model is "", and a shared module has all of its paths.
Modules: TypeAlias = Mapping[str, nn.Module]

#: The heads that "all-linear" leaves out for SEQ_CLS, in the order of PEFT's `SEQ_CLS_HEAD_NAMES`.
_HEADS = ("score", "classifier")
#: task_type -> the heads that `with_head` trains.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
#: Fields that can exclude layers that the targets match.
_EXCLUDING = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_SUPPORTED = (
    "nn.Linear, quantized linear layers, nn.Conv1d to nn.Conv3d, nn.MultiheadAttention and transformers' Conv1D"
)


def walk(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> Modules:
    """The modules of a model, without those that adapters or a graph added.

    `modules` are the items of `named_modules(remove_duplicate=False)`, if known.
    """
    every = state_modules(model, remove_duplicate=False) if modules is None else state_paths(modules)
    found, parts = {}, tuple[str, ...]()
    for path, module in every:
        if isinstance(module, GraphPart):
            parts += (f"{path}.",)
        elif (
            ADAPTER_CHILDREN.isdisjoint(path.split("."))
            and not isinstance(module, ExpertsWeight)
            and not path.startswith(parts)
        ):
            found[path] = module
    return found


def select(model: nn.Module, config: HRAConfig, modules: Modules | None = None) -> dict[str, nn.Module]:
    """Select the layers of `model` that `config` targets: path -> layer, in `named_modules` order.

    A layer with several paths is listed once, under its first path. `modules` is the result of `walk`, if the caller
    has it.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> select(model, HRAConfig(target_modules="all-linear", exclude_modules=["2"]))
    {'0': Linear(in_features=2, out_features=2, bias=True)}
    """
    modules = walk(model) if modules is None else modules
    if any(map(is_peft_layer, modules.values())):
        refuse_peft_layers(model)
    chosen = targeted(model, config, modules)
    if problem := parameters_problem(model, config):
        raise SelectionError(problem)
    if not chosen:
        raise SelectionError(_no_match(model, config, modules))
    _check_types(chosen, modules)
    _check_saved(chosen, saved_modules(model, config, modules), config, modules)
    _warn_unmatched(model, config, modules)
    return chosen


def targeted(model: nn.Module, config: HRAConfig, modules: Modules | None = None) -> dict[str, nn.Module]:
    """The modules of any type that `config` targets, in `named_modules` order, then the parameters: path -> module."""
    modules = walk(model) if modules is None else modules
    targets = resolve_targets(model, config, modules)
    found = {path: module for path, module in once(modules).items() if is_target(config, path, targets)}
    return found | targeted_parameters(model, config)


def is_target(config: HRAConfig, path: str, targets: Collection[str] | str) -> bool:
    """Whether `config` targets the module at `path`. Only the path is checked, not the type of the module.

    `targets` is the result of `resolve_targets`.

    >>> config = HRAConfig(target_modules=["query"], layers_to_transform=1)
    >>> [is_target(config, f"encoder.layer.{i}.query", {"query"}) for i in range(3)]
    [False, True, False]
    """
    if not path or _is_excluded(config, path) or not _matches(targets, path):
        return False
    wanted = config.layers_to_transform
    if isinstance(targets, str) or wanted is None or wanted == []:
        return True
    index = layer_index(config, path)
    return path in targets or (index in wanted if isinstance(wanted, Collection) else index == wanted)


def resolve_targets(model: nn.Module, config: HRAConfig, modules: Modules | None = None) -> set[str] | str:
    """Return `config.target_modules`, with "all-linear" and None replaced by the names that they select in `model`."""
    targets, modules = config.target_modules, walk(model) if modules is None else modules
    if targets is None:
        targets = () if config.target_parameters else _default_targets(model, modules)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model, config, modules)
    return targets if isinstance(targets, str) else set(targets)


def saved_modules(model: nn.Module, config: HRAConfig, modules: Modules | None = None) -> dict[str, nn.Module]:
    """Every path that ends with an entry of `config.modules_to_save`, with or without a dot before it -> module."""
    if not config.modules_to_save:
        return {}
    names, modules = tuple(config.modules_to_save), walk(model) if modules is None else modules
    return {path: module for path, module in modules.items() if path.endswith(names)}


def with_head(model: nn.Module, config: HRAConfig) -> HRAConfig:
    """Return `config` with the head of its `task_type` added to `modules_to_save`, if the model has such a head.

    PEFT's models for sequence classification, token classification and question answering do the same, because a
    randomly initialized head must be trained.

    >>> model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    >>> with_head(model, HRAConfig(task_type="SEQ_CLS", target_modules=["encoder"])).modules_to_save
    ['classifier']
    """
    heads = _TASK_HEADS.get(config.task_type or "", ())
    present = _present(model, heads)
    if not present:
        return config
    # PEFT writes all possible names of a head, so names that this model does not have are not an error.
    given = [name for name in config.modules_to_save or () if name in present or name not in heads]
    return dataclasses.replace(config, modules_to_save=list(dict.fromkeys([*given, *present])))


def without_unmatched(model: nn.Module, config: HRAConfig) -> HRAConfig:
    """Return `config` without entries of `modules_to_save` that do not match any module (see `with_head`)."""
    return dataclasses.replace(config, modules_to_save=_present(model, config.modules_to_save or ()) or None)


def _present(model: nn.Module, names: Collection[str]) -> list[str]:
    """The names that some path ends with."""
    paths = list(walk(model)) if names else []
    return [name for name in names if any(path.endswith(name) for path in paths)]


# ---- matching rules ----


def once(modules: Modules) -> Modules:
    """The modules, each under its first path only."""
    paths: dict[nn.Module, str] = {}
    for path, module in modules.items():
        paths.setdefault(module, path)
    return {path: module for module, path in paths.items()}


def _matches(names: Collection[str] | str, path: str) -> bool:
    """A str must match the full path as a regex; in a collection, one entry must be a dotted suffix of the path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(suffix in names for suffix in suffixes(path))


def _is_excluded(config: HRAConfig, path: str) -> bool:
    """Whether `path` is excluded, independent of the targets."""
    if config.exclude_modules and _matches(config.exclude_modules, path):
        return True
    return any(f".{name}." in f".{path}." for name in config.modules_to_save or ())


def layer_index(config: HRAConfig, path: str) -> int | None:
    """The index of the block that contains `path`, found by the first entry of `layers_pattern` that matches."""
    given = config.layers_pattern
    patterns: Iterable[str | None] = [None] if not given else [given] if isinstance(given, str) else given
    for pattern in patterns:
        # Without a pattern, any name matches if there is a component before it, as in PEFT.
        blocks = r".*?\.[^.]*" if pattern is None else rf"(?:^|.*?\.){pattern}"
        if match := re.match(blocks + r"\.(?P<idx>\d+)\.", path):
            return None if match["idx"] is None else int(match["idx"])
    return None


def _all_linear(model: nn.Module, config: HRAConfig, modules: Modules) -> set[str]:
    """The paths of all linear layers, without the output layer of a transformers model."""
    head = _output_layer(model, config)
    return {path for path, module in once(modules).items() if find_kind(module) == "linear" and module is not head}


def _output_layer(model: nn.Module, config: HRAConfig) -> object:
    """The output embedding of a transformers model, or its head for the task SEQ_CLS; None for other models."""
    origin = origin_of(model)
    if origin.output is not None:
        return model.get_submodule(origin.output)
    heads = _HEADS if origin.is_pretrained and config.task_type == "SEQ_CLS" else ()
    return next((head for name in heads if (head := getattr(model, name, None)) is not None), None)


def _default_targets(model: nn.Module, modules: Modules) -> tuple[str, ...] | str:
    model_type = origin_of(model).model_type
    if model_type in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[model_type]
    raise SelectionError(
        f"`target_modules` must be set: {type(model).__name__} (model_type {model_type!r}) has no default. "
        f"{available(_adaptable_in(modules))}"
    )


def _adaptable_in(modules: Modules) -> list[str]:
    return [path for path, module in once(modules).items() if path and find_kind(module)]


# ---- error messages ----


def _check_saved(chosen: Modules, saved: Modules, config: HRAConfig, modules: Modules) -> None:
    for name in config.modules_to_save or ():
        if not any(path.endswith(name) for path in saved):
            raise SelectionError(f"`modules_to_save`: no module is called {name!r}. {available(modules)}")
    for path, layer in chosen.items():
        if owner := next((s for s in saved if f"{path}.".startswith(f"{s}.")), None):
            is_experts = isinstance(layer, ExpertsWeight)  # `exclude_modules` does not restrict these
            fix = "Use longer names in `target_parameters`" if is_experts else f"Add exclude_modules=[{path!r}]"
            raise SelectionError(
                f"{path}: a layer cannot be both adapted and saved in full, but "
                f"`modules_to_save={config.modules_to_save}` matches {owner!r}. {fix}, or use a longer name in "
                "`modules_to_save`."
            )


def _warn_unmatched(model: nn.Module, config: HRAConfig, modules: Modules) -> None:
    """Warn about names in `target_modules` and about `exclude_modules` that match no module."""
    names, excluded = config.target_modules, config.exclude_modules
    if excluded and not any(_matches(excluded, path) for path in modules):
        text = f"`exclude_modules={format_names(excluded)}` matches no module. {available(modules)}"
        warnings.warn(text, HRAWarning, stacklevel=4)
    # A saved adapter may list the default names of its architecture, but a model may have only some of them.
    listed = set() if names is None or isinstance(names, str) or config.inference_mode else set(names)
    if unmatched := listed - {suffix for path in modules for suffix in suffixes(path)}:
        hint = parameters_hint(model, names=unmatched) or available(_adaptable_in(modules))
        text = f"`target_modules`: {format_names(unmatched)} match no module of {type(model).__name__}. {hint}"
        warnings.warn(text, HRAWarning, stacklevel=4)


def _check_types(chosen: Modules, modules: Modules) -> None:
    """Raise an error that names each kind of module that cannot be adapted, and a list of names that can."""
    kinds: dict[tuple[type, str], str] = {}  # class and name, without the number of a block -> the first path
    for path, module in chosen.items():
        if find_kind(module) is None:
            name = path.rpartition(".")[2]
            kinds.setdefault((type(module), "" if name.isdigit() else name), path)
    if not kinds:
        return
    named = ", ".join(f"{path} ({cls.__name__})" for (cls, _), path in kinds.items())
    wrong = [path for path, module in chosen.items() if find_kind(module) is None]
    inside = tuple(f"{path}." for path in wrong)
    others = {path.rpartition(".")[2] for path, module in modules.items() if not find_kind(module)}
    layers = [path for path in _adaptable_in(modules) if path in chosen or path.startswith(inside)]
    names = list(dict.fromkeys(path if (name := path.rpartition(".")[2]) in others else name for path in layers))
    hints = (parameters_hint(modules[path], path) for path in wrong)
    hint = f"Use target_modules={names}." if names else next(filter(None, hints), "Remove them, or exclude them.")
    raise SelectionError(f"`target_modules` matches {named}, but only {_SUPPORTED} can be adapted. {hint}")


def _no_match(model: nn.Module, config: HRAConfig, modules: Modules) -> str:
    """The message for a configuration that does not select any module."""
    class_name, layers = type(model).__name__, _adaptable_in(modules)
    if not layers:
        return f"{class_name} contains no layer that can be adapted. Supported layers: {_SUPPORTED}."
    targets = resolve_targets(model, config, modules)
    shown = f"`target_modules={format_names(targets if config.target_modules is None else config.target_modules)}`"
    matched = [path for path in once(modules) if path and _matches(targets, path)]
    if not matched:
        hint = parameters_hint(model, names=[targets] if isinstance(targets, str) else targets)
        return f"{shown} matches no module of {class_name}. {hint or available(layers)}"
    given = {name: getattr(config, name) for name in _EXCLUDING}
    fields = " and ".join(f"{name}={value!r}" for name, value in given.items() if value not in (None, [], ""))
    return f"{shown} matches {some_of(matched, 1)}, but none is left after {fields}."
