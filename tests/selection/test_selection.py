"""Errors, warnings and defaults of the selection. Another file compares the selected layers with PEFT."""

from __future__ import annotations

import ast
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import config, mlp, refused
from named_models import Nested, built, tiny_bert, tiny_llama, tiny_opt, tiny_vit
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from tiny import mixtral, t5
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import hra_fx
from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning, SelectionError, UnsupportedLayerError
from hra_fx.selection.origin import DEFAULT_TARGETS
from hra_fx.selection.select import select

NAMES = "Available names: 'query', 'key', 'value', 'dense', 'classifier'. A list has names or ends of paths, and a str"
#: Model, fields of the configuration, and a part of the error.
MESSAGES: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (
        tiny_bert,
        {"target_modules": ["qeury"]},
        f"=['qeury']` matches no module of BertForSequenceClassification. {NAMES}",
    ),
    (Nested, {}, "must be set: Nested (model_type None) has no default. Available names: "),
    (
        nn.ReLU,
        {"target_modules": ["q"]},
        "ReLU contains no layer that can be adapted. Supported layers: nn.Linear, quant",
    ),
    (tiny_opt, {"layers_to_transform": [7]}, "v_proj and 5 more, but none is left after layers_to_transform=[7]."),
    (Nested, {"target_modules": ["head"], "exclude_modules": "he.*"}, "none is left after exclude_modules='he.*'."),
    (
        tiny_bert,
        {"target_modules": ["attention"]},
        "can be adapted. Use target_modules=['query', 'key', 'value', 'dense'].",
    ),
    (tiny_bert, {"modules_to_save": ["clasifier"]}, "no module is called 'clasifier'. Available names: 'bert', 'em"),
    (
        Nested,
        {"target_modules": ["sub_head"], "modules_to_save": ["head"]},
        "`modules_to_save=['head']` matches 'sub_head'. Add exclude_modules=['sub_head'], or use a longer name",
    ),
]


@pytest.mark.parametrize(("make", "kwargs", "message"), MESSAGES)
def test_messages(make: Callable[[], nn.Module], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(message)) as caught:
        select(built(make), HRAConfig(**kwargs))
    assert isinstance(caught.value, ValueError)


def warned(model: nn.Module, **fields: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert select(model, HRAConfig(**fields))
    assert all(warning.category is HRAWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_the_names_that_match_nothing_are_warned_about() -> None:
    model = built(tiny_bert)
    (warning,) = warned(model, target_modules=["query"], exclude_modules="fc1")
    assert warning.startswith("`exclude_modules='fc1'` matches no module. Available names: ")
    (warning,) = warned(model, target_modules=["query", "valeu", "kye"])
    assert warning.startswith(f"`target_modules`: ['kye', 'valeu'] match no module of {type(model).__name__}. {NAMES}")
    # No warning for a name that matches a layer, even if another field excludes this layer.
    quiet = {"exclude_modules": ["value"], "modules_to_save": ["classifier"], "layers_to_transform": [0]}
    assert warned(model, target_modules=["query", "value", "classifier"], **quiet) == []
    assert warned(model, target_modules=r".*(query|valeu)") == []
    assert warned(built(Nested), target_modules=["layers.1.seq", "encoder.again.seq"]) == []  # one layer
    # No warning for a saved adapter, which may list the default names of its architecture.
    assert warned(model, target_modules=["query", "valeu"], inference_mode=True) == []


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_opt, tiny_vit, t5])
def test_a_regex_for_whole_blocks_names_each_kind_of_module_and_a_list_that_works(
    make: Callable[[], nn.Module],
) -> None:
    model = built(make)
    with pytest.raises(SelectionError) as caught:
        select(model, HRAConfig(target_modules=r".*\.(layers?|block)\.\d+\..*"))
    text = str(caught.value)
    blocks = [module for path, module in model.named_modules() if re.search(r"\.(layers?|block)\.\d+\.", path)]
    other = {type(module).__name__ for module in blocks if not isinstance(module, nn.Linear)}
    assert other and all(f" ({name})" in text for name in other)
    names = ast.literal_eval(text.partition("Use target_modules=")[2].rstrip("."))
    assert select(model, HRAConfig(target_modules=names)).items() >= {
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(module is block for block in blocks)
    }


EXPERTS = "`target_modules` does not select 3-D parameters. Use target_parameters="


@pytest.mark.needs("transformers>=5.6")
def test_names_of_parameters_in_target_modules_get_a_hint() -> None:
    (warning,) = warned(mixtral(), target_modules=["q_proj", "gate_up_proj"])
    assert f"{EXPERTS}['experts.gate_up_proj']." in warning
    for names in (["gate_up_proj", "down_proj"], ["experts"]):
        with pytest.raises(SelectionError, match=re.escape(f"{EXPERTS}['experts.gate_up_proj', 'experts.down_proj'].")):
            select(mixtral(), HRAConfig(target_modules=names))


@pytest.mark.needs("peft>=0.21")
def test_default_targets_are_pefts() -> None:
    assert {name: t if isinstance(t, str) else list(t) for name, t in DEFAULT_TARGETS.items()} == PEFT_DEFAULTS


# ---- layers and models that cannot be adapted: the error, and that the model is unchanged ----


def with_layer(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(plain=nn.Linear(6, 6), odd=layer))


def with_instance_forward() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: x
    return layer


def with_old_tp_plan() -> nn.Module:
    layer: Any = nn.Linear(6, 6)
    layer._hf_tp_plan = "colwise"  # as transformers 5.0 to 5.15 sets it
    return layer


def with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Marked(Tensor):
    """A tensor subclass, like those of quantized or distributed tensors."""


#: name -> (layer, reason, fix)
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "instance forward": (with_instance_forward, "its `forward` is set on the instance", "Delete it, or exclude"),
    "old tp_plan": (with_old_tp_plan, "tensor parallelism splits its weight", "Train with FSDP2 or DDP"),
    "LazyLinear": (lambda: nn.LazyLinear(6), "not initialized", "Run the model once first"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
        "its `weight` is computed from other parameters in each call",
        "remove_parametrizations",
    ),
    "int8": (lambda: with_weight(torch.ones(6, 6, dtype=torch.int8)), "got torch.int8", "Exclude the layer"),
    "subclass": (lambda: with_weight(torch.ones(6, 6).as_subclass(Marked)), "tensor, got Marked", "Exclude the layer"),
    "packed": (lambda: with_weight(torch.ones(18, 2)), "expected shape (6, 6), got (18, 2)", "Exclude the layer"),
}


@pytest.mark.parametrize(("make", "reason", "fix"), LAYERS.values(), ids=LAYERS.keys())
def test_layer_is_refused(make: Callable[[], nn.Module], reason: str, fix: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        model = with_layer(make())
    kind = type(model[1]).__name__
    message = refused(model, config("plain", "odd"))
    assert message.startswith(f"odd ({kind}): ")
    assert reason in message and fix in message


def test_more_vectors_than_dimensions() -> None:
    message = refused(nn.Sequential(nn.Conv2d(6, 6, (1, 3), groups=6)), config("0", r=4, apply_GS=True))
    assert "`r` must be at most 3, the input dimension of the layer, got 4. Lower `r`, set `apply_GS=False`" in message


# ---- the model ----


def test_peft_adapter_inside() -> None:
    wrapped = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0"]))
    message = refused(wrapped, config("3"))
    assert message.startswith("base_model.model.0: it already has a PEFT adapter. ")
    hra_fx.transform(wrapped.merge_and_unload(), config("0", "3"))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["torch.compile", "DataParallel"])
def test_a_wrapper_that_renames_parameters_comes_after(wrap: Any, tmp_path: Path) -> None:
    settings = config("0")
    hra_fx.save_adapter(hra_fx.transform(mlp(), settings), tmp_path)
    for act in (lambda model: hra_fx.transform(model, settings), lambda model: hra_fx.load_adapter(model, tmp_path)):
        with pytest.raises(UnsupportedLayerError, match=r"^the model: \S+ adds a prefix .* Adapt the model first"):
            act(wrap(mlp()))
