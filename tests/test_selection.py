"""select() against the real PEFT on whole models, and every error's words."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn

from hra_fx.config import HRAConfig
from hra_fx.default_targets import DEFAULT_TARGETS
from hra_fx.errors import HRAWarning, SelectionError
from hra_fx.selection import is_target, resolve_targets, saved_modules, select


class Block(nn.Module):
    """Names that are endings of each other (q, seq, proj.q), experts with an index of their own, other layer types."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.seq = nn.Linear(4, 4)
        self.proj = nn.ModuleDict({"q": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 3)})
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4), "q": nn.Linear(4, 4)}) for _ in range(2))
        self.norm = nn.LayerNorm(4)


class Nested(nn.Module):
    """Two module lists, layers at the root, a shared block and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.embed = nn.Embedding(5, 4)
        self.stem = nn.Conv2d(4, 4, 1)
        self.conv1d = nn.Conv1d(4, 4, 1)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.encoder = nn.ModuleDict({"h": nn.ModuleList(Block() for _ in range(2))})
        self.encoder["again"] = self.layers[1]
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)))
        self.head = nn.Linear(4, 2)
        self.sub_head = nn.Linear(4, 2)


SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def tiny_bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, vocab_size=11))


def tiny_roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, vocab_size=11))


def tiny_opt() -> nn.Module:
    sizes = {"hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 11}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=16, word_embed_proj_dim=8)
    return transformers.OPTForCausalLM(config)


def tiny_t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def tiny_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=11))


def tiny_llama_classifier() -> nn.Module:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, vocab_size=11))


def tiny_vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config)


def tiny_gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11))


MAKERS: list[Callable[[], nn.Module]] = [
    Nested,
    tiny_bert,
    tiny_roberta,
    tiny_opt,
    tiny_t5,
    tiny_llama,
    tiny_llama_classifier,
    tiny_vit,
    tiny_gpt2,
]


@cache
def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Every model is made once; neither side may change it (PEFT gets a copy)."""
    torch.manual_seed(0)
    return make().requires_grad_(False)


def peft_layers(model: nn.Module, **kwargs: Any) -> list[str] | None:
    """The layers that PEFT really wraps in a copy of `model`, in its order; None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tuner = peft.HRAModel(copy.deepcopy(model), peft.HRAConfig(r=2, **kwargs), "default")
        except (ValueError, TypeError):
            return None
    return list(tuner.targeted_module_names)


def our_layers(model: nn.Module, **kwargs: Any) -> list[str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HRAWarning)
        try:
            return list(select(model, HRAConfig(**kwargs)))
        except SelectionError:
            return None


# ---- against PEFT ----


@st.composite
def configurations(draw: st.DrawFn, model: nn.Module) -> dict[str, Any]:
    """Keywords that fit the names of `model`: mostly its layers, sometimes its containers or nothing."""
    layers = [path for path, m in model.named_modules() if path and isinstance(m, nn.Linear | nn.Conv2d)]
    anything = [path for path, _ in model.named_modules() if path]

    def name(paths: list[str]) -> st.SearchStrategy[str]:
        return st.sampled_from(paths).flatmap(
            lambda path: st.integers(1, path.count(".") + 1).map(lambda n: ".".join(path.split(".")[-n:]))
        )

    mostly = st.integers(0, 9).flatmap(lambda k: name(layers) if k else name(anything) | st.just("nothing"))
    some = st.lists(mostly, min_size=1, max_size=4)
    many = st.lists(st.sampled_from(layers), min_size=min(20, len(layers)), unique=True)
    part = st.sampled_from(sorted({p for path in anything for p in path.split(".")}))
    regex = st.one_of(
        part.map(lambda p: rf".*\.{p}"),
        st.tuples(part, part).map(lambda t: rf".*{t[0]}\..*({t[1]}|q|dense)"),
        st.tuples(part, part).map(lambda t: rf"(.*\.)?({t[0]}|{t[1]})"),
        st.sampled_from(["all-linear", "All-Linear", ".*", ""]),
    )
    kwargs: dict[str, Any] = {"target_modules": draw(some | many | regex | st.none())}
    if draw(st.booleans()):
        kwargs["exclude_modules"] = draw(some | regex.filter(lambda r: r != ".*"))
    if draw(st.integers(0, 3)) == 0:
        wanted = ("head", "q", "lm_head", "score", "classifier", "norm", "fc1")
        heads = [head for head in wanted if any(path.endswith(head) for path in anything)]
        kwargs["modules_to_save"] = draw(st.lists(st.sampled_from(heads), unique=True, max_size=2))
    if not isinstance(kwargs["target_modules"], str) and draw(st.booleans()):
        kwargs["layers_to_transform"] = draw(st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2))
        pattern = part | st.sampled_from(["", "h|layers", "[^.]*", "(?:layer|block)s?"])
        kwargs["layers_pattern"] = draw(st.none() | pattern | st.lists(pattern, max_size=2))
    kwargs["task_type"] = draw(st.sampled_from([None, "SEQ_CLS", "CAUSAL_LM"]))
    return kwargs


@pytest.mark.parametrize("make", MAKERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_random_configurations_give_pefts_layers(make: Callable[[], nn.Module], data: st.DataObject) -> None:
    model = built(make)
    kwargs = data.draw(configurations(model))
    theirs, ours = peft_layers(model, **kwargs), our_layers(model, **kwargs)
    saved = [p for p, _ in model.named_modules() if p and p.endswith(tuple(kwargs.get("modules_to_save") or ["\0"]))]
    if theirs is not None and set(theirs) & set(saved):
        assert ours is None  # PEFT wraps such a layer twice
    else:
        assert ours == theirs


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "CAUSAL_LM"])
def test_all_linear_and_defaults(make: Callable[[], nn.Module], task_type: str | None) -> None:
    model = built(make)
    for targets in ("all-linear", None):
        kwargs = {"target_modules": targets, "task_type": task_type}
        assert our_layers(model, **kwargs) == peft_layers(model, **kwargs)


@pytest.mark.parametrize(
    ("make", "kwargs", "count", "absent"),
    [
        (tiny_llama, {"target_modules": "all-linear"}, 14, "lm_head"),
        (tiny_opt, {"target_modules": "all-linear"}, 18, "lm_head"),
        (tiny_bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, 13, "classifier"),
        (tiny_bert, {"target_modules": "all-linear"}, 14, None),
        (tiny_llama_classifier, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, 14, "score"),
        (tiny_vit, {"target_modules": "all-linear"}, 13, None),
        (tiny_bert, {}, 4, "bert.encoder.layer.0.attention.self.key"),
        (tiny_t5, {}, 12, "decoder.block.0.layer.0.SelfAttention.k"),
        (tiny_opt, {"layers_to_transform": [0, 2]}, 4, "model.decoder.layers.1.self_attn.q_proj"),
        (tiny_opt, {"layers_to_transform": 0}, 2, "model.decoder.layers.1.self_attn.q_proj"),
        (tiny_opt, {"layers_to_transform": []}, 6, None),
        (tiny_opt, {"exclude_modules": r".*\.1\..*"}, 4, "model.decoder.layers.1.self_attn.q_proj"),
        (Nested, {"target_modules": ["q"], "layers_to_transform": 1}, 8, "layers.1.q"),
        (Nested, {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "layers"}, 5, "layers.0.q"),
        (Nested, {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "experts"}, 6, "layers.0.q"),
        (Nested, {"target_modules": ["head"]}, 1, "sub_head"),
        (Nested, {"target_modules": ["layers.0.q", "layers.2.q"], "layers_to_transform": 2}, 2, "layers.1.q"),
        (Nested, {"target_modules": ["seq"], "exclude_modules": ["layers.0.seq"]}, 4, "layers.0.seq"),
        (tiny_bert, {"target_modules": ["dense"]}, 7, None),
        (
            tiny_bert,
            {"target_modules": ["dense"], "modules_to_save": ["attention"]},
            5,
            "bert.encoder.layer.0.attention.output.dense",
        ),
    ],
)
def test_table(make: Callable[[], nn.Module], kwargs: dict[str, Any], count: int, absent: str | None) -> None:
    model = built(make)
    chosen = select(model, HRAConfig(**kwargs))
    assert list(chosen) == peft_layers(model, **kwargs)
    assert len(chosen) == count
    assert absent is None or (absent not in chosen and model.get_submodule(absent) is not None)
    assert all(model.get_submodule(path) is layer for path, layer in chosen.items())


def test_long_lists_lose_whole_paths_to_layer_indices_as_in_peft() -> None:
    model = built(tiny_opt)
    everything = list(select(model, HRAConfig(target_modules="all-linear")))
    for size in (18, 17, 5):
        kwargs = {"target_modules": everything[:size], "layers_to_transform": [0]}
        assert our_layers(model, **kwargs) == peft_layers(model, **kwargs) == everything[:size]
    more = [*everything, "absent.one", "absent.two"]
    kwargs = {"target_modules": more, "layers_to_transform": [0]}
    assert our_layers(model, **kwargs) == peft_layers(model, **kwargs) == everything[:6]


def test_long_lists_that_cannot_become_shorter_stay_whole_paths_as_in_peft() -> None:
    leaves = {f"fc{i}": nn.Linear(2, 2) for i in range(24)}
    model = nn.ModuleDict({"m": nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict(leaves)])})})
    paths = [f"m.h.0.{name}" for name in leaves]
    kwargs = {"target_modules": paths, "layers_to_transform": [1]}
    assert our_layers(model, **kwargs) == peft_layers(model, **kwargs) == paths


@pytest.mark.parametrize(
    ("kwargs", "path", "expected"),
    [
        ({"target_modules": ["q"]}, "q", True),
        ({"target_modules": ["q"]}, "a.q", True),
        ({"target_modules": ["q"]}, "a.seq", False),
        ({"target_modules": ["q"]}, "q.a", False),
        ({"target_modules": ["a.q"]}, "b.a.q", True),
        ({"target_modules": ["a.q"]}, "aa.q", False),
        ({"target_modules": ["*.q"]}, "a.q", False),
        ({"target_modules": "q"}, "a.q", False),
        ({"target_modules": r".*\.q"}, "a.q", True),
        ({"target_modules": r".*\.q"}, "a.q.b", False),
        ({"target_modules": []}, "q", False),
        ({"target_modules": None}, "q", False),
        ({"target_modules": ".*"}, "", False),
        ({"target_modules": [""]}, "", False),
        ({"target_modules": ["q"], "exclude_modules": ["a.q"]}, "b.a.q", False),
        ({"target_modules": ["q"], "exclude_modules": ["a"]}, "a.q", True),
        ({"target_modules": ["q"], "exclude_modules": "a.*"}, "a.q", False),
        ({"target_modules": ["q"], "exclude_modules": "a"}, "a.q", True),
        ({"target_modules": ["q"], "modules_to_save": ["a"]}, "b.a.c.q", False),
        ({"target_modules": ["q"], "modules_to_save": ["a"]}, "b.aa.q", True),
        ({"target_modules": ["q"], "modules_to_save": []}, "a.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "m.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "h.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h"}, "h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["x", "h"]}, "h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "x"}, "h.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "m.h.0.e.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "e"}, "m.h.0.e.1.q", True),
        ({"target_modules": ["m.h.0.q"], "layers_to_transform": 1}, "m.h.0.q", True),
        ({"target_modules": ["1"], "layers_to_transform": 1}, "m.h.1", False),
        ({"target_modules": ".*"}, "a.q.hra_u", False),
        ({"target_modules": ["default"]}, "a.q.hra_u.default", False),
        ({"target_modules": ".*"}, "a.hra_unlike", True),
    ],
)
def test_is_target(kwargs: dict[str, Any], path: str, expected: bool) -> None:
    assert is_target(HRAConfig(**kwargs), path) is expected


def test_is_target_with_resolved_targets() -> None:
    config = HRAConfig(target_modules="all-linear", exclude_modules=["fc2"])
    targets = resolve_targets(built(tiny_opt), config)
    assert is_target(config, "model.decoder.layers.0.fc1", targets)
    assert not is_target(config, "model.decoder.layers.0.fc1")
    assert not is_target(config, "model.decoder.layers.0.fc2", targets)
    assert not is_target(config, "lm_head", targets)


def test_default_targets_are_pefts() -> None:
    assert {name: t if isinstance(t, str) else list(t) for name, t in DEFAULT_TARGETS.items()} == PEFT_DEFAULTS


class Configured(nn.Module):
    """A model whose `config` is what it is given."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(2, 2), "o": nn.Linear(2, 2)}) for _ in range(2))


class Speaks:
    def to_dict(self) -> dict[str, str]:
        return {"model_type": "opt"}


class Typed:
    model_type = "opt"


@pytest.mark.parametrize("config", [{"model_type": "opt"}, Typed(), Speaks()])
def test_default_targets_by_every_kind_of_config(config: object) -> None:
    assert list(select(Configured(config), HRAConfig())) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_nothing_is_changed() -> None:
    model, config = built(Nested), HRAConfig(target_modules="all-linear", modules_to_save=["head"])
    before = config.to_dict(), [(path, id(m), type(m)) for path, m in model.named_modules()]
    with pytest.raises(SelectionError):
        select(model, config)  # 'head' also ends 'sub_head'
    config.exclude_modules = ["sub_head"]
    assert "sub_head" not in select(model, config)
    config.exclude_modules = None
    assert before == (config.to_dict(), [(path, id(m), type(m)) for path, m in model.named_modules()])


def test_lists_put_into_a_config_later_work() -> None:
    config = HRAConfig()
    config.target_modules = ["fc1"]
    assert len(select(built(tiny_opt), config)) == 3


def test_a_layer_on_two_paths_is_listed_once() -> None:
    chosen = select(built(Nested), HRAConfig(target_modules=["seq"]))
    assert list(chosen) == [*(f"layers.{i}.seq" for i in range(3)), *(f"encoder.h.{i}.seq" for i in range(2))]


def test_what_an_earlier_adapter_added_is_not_walked() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].hra_u = nn.ModuleDict({"inner": nn.Linear(2, 2)})
    for targets in ("all-linear", ".*"):
        assert list(select(model, HRAConfig(target_modules=targets))) == ["0", "1"]
    with pytest.raises(SelectionError, match="names no module of Sequential"):
        select(model, HRAConfig(target_modules=["inner"]))
    with pytest.raises(SelectionError, match="modules_to_save: no module is called 'inner'"):
        select(model, HRAConfig(target_modules=["0"], modules_to_save=["inner"]))


def test_saved_modules_end_with_an_entry() -> None:
    model = built(Nested)
    assert list(saved_modules(model, HRAConfig(modules_to_save=["head"]))) == ["head", "sub_head"]
    assert "encoder.again.norm" in saved_modules(model, HRAConfig(modules_to_save=["norm"]))
    assert saved_modules(model, HRAConfig(modules_to_save=["nope"])) == {}
    assert saved_modules(model, HRAConfig()) == saved_modules(model, HRAConfig(modules_to_save=[])) == {}


# ---- what errors say ----

Case = tuple[Callable[[], nn.Module], dict[str, Any], str]


def bare_linear() -> nn.Module:
    return nn.Linear(2, 2)


def ten_blocks() -> nn.Module:
    return nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(10))})


NO_NAME: list[Case] = [
    (
        tiny_bert,
        {"target_modules": ["qeury"]},
        "names no module of BertForSequenceClassification; did you mean 'query'?",
    ),
    (tiny_bert, {"target_modules": ["Query", "valeu"]}, "did you mean 'query' or 'value'?"),
    (tiny_bert, {"target_modules": ["self.qery"]}, "did you mean 'self.query' or 'self.key' or 'self.value'?"),
    (tiny_bert, {"target_modules": ["a.b.c.query1"]}, "did you mean 'query'?"),
    (
        tiny_bert,
        {"target_modules": ["xyz"]},
        ". The names to choose from are 'query', 'key', 'value', 'dense', 'classif",
    ),
    (tiny_bert, {"target_modules": "qeury"}, "did you mean ['query']?"),
    (
        tiny_bert,
        {"target_modules": "query"},
        "must match the whole path; to match the end of it write the list ['query'].",
    ),
    (tiny_bert, {"target_modules": "layer.0.*qu"}, "only a part of 'bert.encoder.layer.0.attention.self.query'."),
    (
        tiny_bert,
        {"target_modules": [".*query"]},
        "In a list '.*query' is a name, not a regular expression: give the str",
    ),
    (
        tiny_bert,
        {"target_modules": []},
        "target_modules: [] names nothing. The layers of BertForSequenceClassification",
    ),
    (tiny_opt, {"target_modules": ["("]}, "The names to choose from are"),
    (Nested, {}, "there is no default for Nested, which has no config.model_type. Give target_modules. The Linear"),
    (tiny_vit, {}, "there is no default for model_type 'vit'. Give target_modules. The Linear and Conv2d layers of"),
    (nn.ReLU, {}, "It has no layer to adapt."),
    (nn.ReLU, {"target_modules": ["q"]}, "target_modules: ReLU has no Linear or Conv2d layer to adapt."),
    (bare_linear, {"target_modules": "all-linear"}, "the model is itself a Linear, and only layers inside it can be"),
]
ALL_LEFT_OUT: list[Case] = [
    (
        tiny_opt,
        {"layers_to_transform": [7]},
        "target_modules: ['q_proj', 'v_proj'], the default for 'opt', names 6 modules such as "
        "'model.decoder.layers.0.self_attn.v_proj', but nothing is left after layers_to_transform=[7] "
        "(their layer indices are 0, 1, 2).",
    ),
    (
        tiny_opt,
        {"target_modules": ["fc1"], "layers_to_transform": 1, "layers_pattern": "h"},
        "layers_to_transform=1 with layers_pattern='h' (no layer index is found in their paths)",
    ),
    (
        ten_blocks,
        {"target_modules": ["q"], "layers_to_transform": 10, "layers_pattern": "h"},
        "layers_to_transform=10 with layers_pattern='h' (their layer indices are 0 to 9)",
    ),
    (
        Nested,
        {"target_modules": ["head"], "exclude_modules": "he.*"},
        "['head'] names 1 module such as 'head', but nothing is left after exclude_modules='he.*'.",
    ),
    (
        tiny_opt,
        {"target_modules": ["fc1"], "exclude_modules": ["0.fc1"], "layers_to_transform": 0, "modules_to_save": ["2"]},
        "nothing is left after exclude_modules=['0.fc1'] and layers_to_transform=0 "
        "(their layer indices are 0, 1, 2) and modules_to_save=['2'].",
    ),
]
WRONG_TYPE: list[Case] = [
    (
        tiny_bert,
        {"target_modules": ["attention"]},
        "bert.encoder.layer.0.attention: target_modules names it, but it is a BertAttention, and only nn.Linear and"
        " nn.Conv2d can be adapted. To adapt the layers inside it write target_modules=["
        "'attention.self.query', 'attention.self.key', 'attention.self.value', 'attention.output.dense'].",
    ),
    (tiny_bert, {"target_modules": ["encoder"]}, "write target_modules=['query', 'key', 'value', 'dense']."),
    (Nested, {"target_modules": ["experts.0"]}, "write target_modules=['experts.0.w1', 'experts.0.q']."),
    (Nested, {"target_modules": ["embed"]}, "embed: target_modules names it, but it is a Embedding"),
    (Nested, {"target_modules": ["conv1d"]}, "Name it no more, or add exclude_modules=['conv1d']."),
    (Nested, {"target_modules": ".*norm|.*head"}, "layers.0.norm: target_modules names it, but it is a LayerNorm"),
    (tiny_gpt2, {}, "transformer.h.0.attn.c_attn: target_modules names it, but it is a Conv1D"),
    (tiny_gpt2, {"target_modules": "all-linear"}, "Replace it by an nn.Linear with the transposed weight, or name"),
]
TO_SAVE: list[Case] = [
    (tiny_bert, {"modules_to_save": ["clasifier"]}, "no module is called 'clasifier'; did you mean 'classifier'?"),
    (tiny_bert, {"modules_to_save": ["classifier", "zzzz"]}, "modules_to_save: no module is called 'zzzz'. The names"),
    (
        Nested,
        {"target_modules": ["sub_head"], "modules_to_save": ["head"]},
        "sub_head: is to be adapted, and modules_to_save=['head'] saves 'sub_head' in full. "
        "Add exclude_modules=['sub_head'], or write the whole name of what is to be saved.",
    ),
]


@pytest.mark.parametrize(("make", "kwargs", "message"), NO_NAME + ALL_LEFT_OUT + WRONG_TYPE + TO_SAVE)
def test_messages(make: Callable[[], nn.Module], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(message)) as caught:
        select(built(make), HRAConfig(**kwargs))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("excluded", [["fc3"], "fc1", r".*\.fc3"])
def test_unused_exclusion_warns(excluded: Any) -> None:
    config = HRAConfig(target_modules=["fc1"], exclude_modules=excluded)
    with pytest.warns(HRAWarning, match="exclude_modules: .* leaves no module out") as caught:
        assert len(select(built(tiny_opt), config)) == 3
    assert len(caught) == 1


def test_used_exclusion_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(built(tiny_opt), HRAConfig(target_modules=["fc1"], exclude_modules=["fc2"]))
